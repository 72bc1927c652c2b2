"""Finds a verifier by its name, or by the import path of a user's own, and the functions that belong to it."""

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from grpo_jax.tasks.task import Verdict

# name: module, and its functions that judge a completion, give its answer, and check a target
_FUNCTIONS: dict[str, tuple[str, str, str | None, str]] = {
    "exact": ("structured", "verify_exact", "answer_exact", "check_exact"),
    "number_hash": ("numeric", "verify_hash", "answer_hash", "check_target"),
    "number_boxed": ("numeric", "verify_boxed", "answer_boxed", "check_target"),
    "number_tag": ("numeric", "verify_tag", "answer_tag", "check_target"),
    "number_last": ("numeric", "verify_last", "answer_last", "check_target"),
    "countdown": ("countdown", "verify", "answer", "check_target"),
    "constraint": ("constraints", "verify", None, "parse_constraint"),
    "json": ("structured", "verify_json", "answer_json", "check_json"),
    "regex": ("structured", "verify_regex", None, "check_regex"),
    "math_verify": ("symbolic", "verify", "answer", "check_target"),
}
# name: module that the verifier needs, package to install
_EXTRAS = {
    "json": ("jsonschema", "jsonschema"),
    "regex": ("re2", "google-re2"),
    "math_verify": ("math_verify", "math-verify"),
}

# Modules whose functions take a text as a program, a command or a path: no verifier is among them.
_EXECUTING = (
    "builtins",
    "code",
    "codeop",
    "ctypes",
    "importlib",
    "io",
    "nt",
    "os",
    "pickle",
    "posix",
    "pty",
    "runpy",
    "shutil",
    "subprocess",
)

VERIFIERS = {name: f"grpo_jax.tasks.{module}:{verify}" for name, (module, verify, _, _) in _FUNCTIONS.items()}
"""``verify(completion, target, truncated) -> Verdict``."""

ANSWERS = {name: f"grpo_jax.tasks.{module}:{answer}" for name, (module, _, answer, _) in _FUNCTIONS.items() if answer}
"""``answer(completion) -> str | None``: what a majority vote counts."""

TARGETS = {name: f"grpo_jax.tasks.{module}:{check}" for name, (module, _, _, check) in _FUNCTIONS.items()}
"""``check(target)`` raises ValueError for a target that the verifier could not use."""


def find_verifier(name: str) -> Callable[[str, str, bool], Verdict]:
    """The verifier of that name, or at that import path, fit for worker processes.

    name: a key of ``VERIFIERS``, or ``module:function`` of the user's own, which is imported here: from the import path, or
    from the working directory, which then becomes its last entry, for the workers too. Raises ValueError for an unknown
    name, a module or function that does not exist, or a function that does not take (completion, target, truncated) or that
    workers could not import; ImportError naming the package to install; and whatever a user's module raises.

    >>> str(find_verifier("exact")("yes", "yes", False))
    'correct'
    >>> find_verifier("exakt")
    Traceback (most recent call last):
    ...
    ValueError: unknown verifier 'exakt'; known: exact, number_hash, number_boxed, number_tag, number_last, countdown, \
constraint, json, regex, math_verify; or module:function, your own
    """
    if name in _EXTRAS:
        module, package = _EXTRAS[name]
        if importlib.util.find_spec(module) is None:
            raise ImportError(
                f"verifier {name!r} needs the package {package}: pip install {package}, or the extra verifiers"
            )
    if name not in VERIFIERS and ":" not in name:
        raise ValueError(f"unknown verifier {name!r}; known: {', '.join(VERIFIERS)}; or module:function, your own")
    if name not in VERIFIERS and (here := os.getcwd()) not in map(os.path.abspath, sys.path):
        sys.path.append(here)  # last: a file that stands there by chance hides no module
    verify = _imported(VERIFIERS.get(name, name))
    if not callable(verify) or inspect.isclass(verify):
        raise ValueError(f"verifier {name!r} is a {type(verify).__name__}, not a function")
    if (getattr(verify, "__module__", None) or "").partition(".")[0] in _EXECUTING:
        raise ValueError(
            f"verifier {name!r} would execute what the model writes, and judges nothing: name a function of yours"
        )
    import_path(verify)
    try:
        inspect.signature(verify).bind("completion", "target", False)
    except TypeError as error:
        raise ValueError(f"verifier {name!r} must take (completion, target, truncated): {error}") from None
    return verify


def find_answer(name: str) -> Callable[[str], str | None] | None:
    """The answer function that belongs to a verifier, or None.

    >>> find_answer("exact")(" yes "), find_answer("regex")
    ('yes', None)
    """
    return _imported(ANSWERS[name]) if name in ANSWERS else None


def find_target_check(name: str) -> Callable[[str], Any] | None:
    """The check of targets that belongs to a verifier, or None: ``check(target)`` raises ValueError.

    >>> find_target_check("countdown")("24: 3 8 8 1")
    """
    return _imported(TARGETS[name]) if name in TARGETS else None


def import_path(verify: Callable[..., Any]) -> str:
    """``module:function``, by which a worker process finds the function.

    Raises ValueError for one that it would not find: nested, a lambda, made by a decorator that hides its name, or of the
    script itself.

    >>> import_path(import_path)
    'grpo_jax.tasks.verifiers:import_path'
    >>> import_path(lambda completion, target, truncated: Verdict.wrong)
    Traceback (most recent call last):
    ...
    ValueError: verifier grpo_jax.tasks.verifiers:<lambda> is not a named function of a module, so workers cannot import it
    """
    module, name = getattr(verify, "__module__", None), getattr(verify, "__qualname__", "<unnamed>")
    if not module or module == "__main__" or "<" in name:
        raise ValueError(f"verifier {module}:{name} is not a named function of a module, so workers cannot import it")
    with contextlib.suppress(KeyError, AttributeError):
        if attrgetter(name)(sys.modules[module]) == verify:
            return f"{module}:{name}"
    raise ValueError(f"verifier {module}:{name} is not what that name of the module means, so workers cannot import it")


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # it exists, and lacks something itself
        places = ", ".join(dict.fromkeys(map(os.path.abspath, sys.path)))
        raise ValueError(
            f"verifier {path!r}: there is no module {error.name!r} on the import path or in the working directory; "
            f"looked in {places}"
        ) from None
    except (ValueError, TypeError):
        raise ValueError(f"verifier {path!r}: {module!r} is not the name of a module") from None
    try:
        return attrgetter(name)(imported)
    except AttributeError:
        where = getattr(imported, "__file__", None)
        raise ValueError(f"verifier {path!r}: module {module!r} has no function {name!r} ({where})") from None
