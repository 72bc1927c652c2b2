"""report.html: what it says of runs finished or not, of no run, of two; and that nothing of a model is markup in it."""

import http.client
import json
import re
import threading
from pathlib import Path

import pytest

from grpo_jax.files import read_jsonl, read_sealed, write_jsonl, write_sealed
from grpo_jax.report.__main__ import main
from grpo_jax.report.html_page import inert, page
from grpo_jax.report.run_story import COMPLETIONS, FILES, read_run
from grpo_jax.report.server import Source, make_server
from tests.report.story import HOSTILE, write_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "unfinished", finished=False)


def lines_of(text: str) -> list[dict]:
    """The JSON lines that a page holds."""
    (data,) = re.findall(
        r'<script type="application/json" id="data" data-live="(?:true|false)">(.*?)</script>', text, re.S
    )
    return [json.loads(line) for line in data.split("\n")]


def test_a_finished_run_is_one_file_with_all_of_it(finished, capsys):
    assert main(["html", str(finished)]) == 0
    path = finished / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    head, *prompts = lines_of(path.read_text())
    (run,), result = head["runs"], read_sealed(finished / "result.json")
    assert run["title"] == "GRPO at β = 1, seed 0" and run["standing"] == result["standing"]
    assert run["intervals"]["p_star"]["mean"] == pytest.approx(result["p_star"]["mean"], abs=1e-6)
    assert run["probes"]["iteration"] == [0, 10, 20, 30, 40]
    assert run["probes"]["mean"][-1] == pytest.approx(result["p_final"]["mean"], abs=1e-6)
    assert set(run["prompts"]) == {"p_ref", "p_star", "p_final"}
    assert len(prompts) == len(head["prompts"]) == 120
    stored = read_jsonl(finished / COMPLETIONS)
    for prompt, row in zip(prompts, stored, strict=True):
        assert prompt["prompt"] == row["prompt"]
        assert [prompt["runs"][0][side] for side in ("before", "after")] == [row["before"], row["after"]]
    assert [one["iteration"] for one in prompts[0]["runs"][0]["during"]] == [10, 20]


def test_the_same_run_gives_the_same_bytes(finished):
    assert page([read_run(finished)]) == page([read_run(finished)])
    result = read_sealed(finished / "result.json")
    assert page([read_run(finished, result)]) == page([read_run(finished)])  # as a run writes it, before its result


def test_nothing_of_a_model_is_markup(finished):
    """Whatever a completion holds, the page has the tags of an empty one."""
    text = page([read_run(finished)])
    assert text.split("data-live=", 1)[1].split("</script>", 1)[0].isascii()
    for hostile in HOSTILE[:4]:
        assert hostile not in text
    tags = re.findall(r"<[/!]?[a-zA-Z-]+", text)
    assert tags.count("<script") == tags.count("</script") == 2
    assert "onerror=" in text and not re.search(r"<[^>]*\son\w+=", text)  # as text of JSON alone
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.search(r"(src|href)=\"?(https?:)?//", text)


def test_json_is_inert_and_comes_back():
    for hostile in HOSTILE:
        text = inert({"text": hostile})
        assert json.loads(text) == {"text": hostile}
        assert text.isascii() and not set(text) & set("<>&\n")
    with pytest.raises(ValueError):
        inert(float("nan"))


def test_numbers_that_are_not_finite_are_unknown(tmp_path):
    run = write_run(tmp_path / "run", prompts=3)
    result = read_sealed(run / "result.json")
    write_sealed(run / "result.json", result | {"p_final": result["p_final"] | {"high": float("inf")}})
    assert lines_of(page([read_run(run)]))[0]["runs"][0]["intervals"]["p_final"]["high"] is None


def test_samples_that_somebody_changed_are_named_or_left_out(tmp_path):
    run = write_run(tmp_path / "run", prompts=3)
    rows, probes = read_jsonl(run / COMPLETIONS), read_jsonl(run / "probes.jsonl")
    one = rows[0]["before"][0]
    changes = [
        {"pieces": "text"},
        {"pieces": [1, *one["pieces"][1:]]},
        {"reward": None},
        {"verdict": 1},
        {"truncated": 0},
    ]
    changes += [{"log_ratios": one["log_ratios"][1:]}, {"log_ratios": [float("inf"), *one["log_ratios"][1:]]}]
    whole = page([read_run(run)])
    for change in changes:
        write_jsonl(run / COMPLETIONS, [rows[0] | {"before": [one | change]}, *rows[1:]])
        with pytest.raises(ValueError, match=r"completions\.jsonl: not what a run of 3 prompts has written"):
            read_run(run)
        write_jsonl(run / COMPLETIONS, rows)
        write_jsonl(
            run / "probes.jsonl",
            [*probes, probes[0] | {"completions": [one | change]}, {"plaze": 1}, [], probes[0] | {"place": 3}],
        )
        assert page([read_run(run)]) == whole
    write_jsonl(run / COMPLETIONS, rows[1:])
    with pytest.raises(ValueError, match="3 prompts"):
        read_run(run)


def test_a_run_on_its_way_is_predicted_anew(finished, unfinished):
    story, of_result = read_run(unfinished), read_run(finished)
    assert story["standing"] is None and (story["done"], story["iterations"]) == (20, 40)
    assert story["intervals"]["p_star"] == of_result["intervals"]["p_star"]
    assert story["prompts"]["p_star"] == of_result["prompts"]["p_star"] and "p_final" not in story["prompts"]
    assert story["intervals"]["forecast"] == {"mean": 0.7, "low": 0.6, "high": 0.8}
    assert "predicted p*" in dict(story["lines"])
    head, first, *_, last = lines_of(page([story]))
    assert head["latest"]["iteration"] == 20 and len(head["latest"]["completions"]) == 1
    assert first["runs"][0]["before"][0]["pieces"] == [HOSTILE[-1]] and last["prompt"] == HOSTILE[0]


def test_two_runs_are_compared_prompt_by_prompt_where_they_have_the_same(finished, tmp_path, capsys):
    other = write_run(tmp_path / "other", gain=-0.1)
    assert main(["html", str(finished), str(other)]) == 0
    head, *prompts = lines_of(Path(capsys.readouterr().out.strip()).read_text())
    assert (finished / "report-other.html").exists() and head["joined"]
    assert [run["name"] for run in head["runs"]] == ["finished", "other"]
    assert all(len(prompt["runs"]) == 2 for prompt in prompts)
    fewer = write_run(tmp_path / "fewer", prompts=7)
    head, *prompts = lines_of(page([read_run(finished), read_run(fewer)]))
    assert not head["joined"] and all(len(prompt["runs"]) == 1 for prompt in prompts)


def test_what_is_no_run_is_said_in_one_line(tmp_path, capsys):
    def said(*arguments: str) -> str:
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "not a run directory (no config.json)" in said("html", str(tmp_path))
    assert "not a run directory (no config.json)" in said("serve", str(tmp_path / "none"))
    assert "the following arguments are required: RUN" in said("html")
    assert "--port=70000 must be 0 (any that is free) to 65535" in said("serve", str(tmp_path), "--port=70000")
    run = write_run(tmp_path / "run", prompts=3)
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    write_sealed(evaluation / "config.json", {"checkpoint.name": "reference"})
    assert "not the directory of a run" in said("html", str(evaluation))
    (run / "result.json").write_text((run / "result.json").read_text().replace("0", "1", 1))
    assert "result.json: changed since it was written" in said("html", str(run))
    for name in ("result.json", "reference.json"):
        (run / name).unlink()
    assert "its reference has not been measured" in said("html", str(run), f"--output={tmp_path / 'a.html'}")
    assert not (tmp_path / "a.html").exists() and not (run / "report.html").exists()
    assert read_run(run)["prompts"] == {}  # which a page that is served waits for


@pytest.fixture
def served(tmp_path):
    run = write_run(tmp_path / "run", prompts=5, finished=False)
    with make_server([run]) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert server.server_address[0] == "127.0.0.1"
        yield run, server.server_port
        server.shutdown()


def ask(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_a_run_is_served_as_it_goes_on(served):
    run, port = served
    status, text, headers = ask(port, "/")
    assert status == 200 and "connect-src 'self'" in text and headers["X-Frame-Options"] == "DENY"
    status, lines, headers = ask(port, "/data")
    assert status == 200 and json.loads(lines.split("\n")[0])["latest"]["iteration"] == 20
    version = headers["X-Version"]
    assert ask(port, f"/data?version={version}")[:2] == (204, "")
    rows = read_jsonl(run / "probes.jsonl")
    write_jsonl(run / "probes.jsonl", [*rows, rows[-1] | {"iteration": 30}])
    status, lines, headers = ask(port, f"/data?version={version}")
    assert status == 200 and json.loads(lines.split("\n")[0])["latest"]["iteration"] == 30
    assert headers["X-Version"] != version
    (run / "reference.json").write_text("{}")
    status, text, _ = ask(port, "/data")
    assert status == 503 and "reference.json" in text


def test_it_answers_this_machine_alone(served):
    _, port = served
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", f"127.0.0.1:{port + 1}", ""):
        assert ask(port, "/", Host=host)[0] == 403, host
    for host in ("localhost", f"localhost:{port}", "127.0.0.1"):
        assert ask(port, "/", Host=host)[0] == 200, host
    for path in ("/../config.json", "/config.json", "//evil.example/"):
        assert ask(port, path)[0] == 404


def test_every_file_that_is_read_makes_a_new_version(tmp_path):
    run = write_run(tmp_path / "run", prompts=3)
    source, versions = Source([run]), set()
    versions.add(source.now()[0])
    assert source.now()[0] in versions
    there = [name for name in FILES if (run / name).exists()]
    assert len(there) >= 5
    for name in there:
        (run / name).write_bytes((run / name).read_bytes() + b"\n")
        versions.add(source.now()[0])
    assert len(versions) == 1 + len(there)
