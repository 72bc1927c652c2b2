"""What one must read to understand the method stays short enough to be read; python -m tests.size shows the rest."""

from tests.size import READING_LIMIT, ROOT, by_room, count, reading_set


def test_the_reading_set_is_short(capsys):
    sizes = {path.relative_to(ROOT): count(path)["lines"] for path in reading_set()}
    total = sum(sizes.values())
    with capsys.disabled():
        print(f"\nreading set: {total:,} lines in {len(sizes)} files")
    names = {str(path) for path in sizes}
    assert {"grpo_jax/train/iteration.py", "grpo_jax/objective/loss.py", "grpo_jax/rollout/sampling.py"} <= names
    assert total <= READING_LIMIT, sizes


def test_what_is_counted(tmp_path):
    (tmp_path / "room").mkdir()
    file = tmp_path / "room" / "a.py"
    file.write_text(
        '"""A\ndocstring."""\n\n# a comment\nx = """no\ndocstring"""  # and one\n\n\ndef f():\n    """One."""\n'
    )
    counted = {"code": 3, "docstrings": 3, "comments": 2, "lines": 10}
    assert dict(count(file)) == counted
    assert {room: dict(counts) for room, counts in by_room(tmp_path).items()} == {"room": counted, "total": counted}
