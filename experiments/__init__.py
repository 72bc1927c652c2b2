"""Commands that produce the numbers and figures of the README and of docs/."""
