# The checkout with its environment: docker build --build-arg DEVICE=tpu -t IMAGE .   (DEVICE: cpu, tpu or gpu)
FROM python:3.12-slim
ARG DEVICE=cpu
WORKDIR /grpo_jax
COPY requirements.txt .
# jax's own extra brings the compiler of the device, in the version that requirements.txt pins.
RUN pip install --no-cache-dir -r requirements.txt && pip install --no-cache-dir gcsfs tensorflow-datasets importlib_resources && \
    version=$(python -c "import jax; print(jax.__version__)") && \
    case $DEVICE in \
      tpu) pip install --no-cache-dir "jax[tpu]==$version" ;; \
      gpu) pip install --no-cache-dir "jax[cuda13]==$version" ;; \
    esac
COPY . .
# The command grpo-jax, which python launch.py is too.
RUN pip install --no-cache-dir --no-deps -e .
