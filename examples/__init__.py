"""GRPO with our loss inside other people's models: one page each, which stands alone and runs on a CPU."""
