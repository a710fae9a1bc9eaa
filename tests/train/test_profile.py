"""`mpma profile`: phases that add up, operators, and a run that is left alone."""

import json
import time

import pytest
import torch
from torch import nn

from mpma_train import cli
from mpma_train.phases import Phases, by_phase


def test_a_profile_of_a_few_steps(pretrain_argv, tmp_path, capsys):
    folder = tmp_path / "profile"
    options = ("--profile_steps", "2", "--profile_dir", str(folder))
    assert cli.main(["profile", *pretrain_argv(*options)]) == 0
    found = json.loads((folder / "profile.json").read_text())
    assert (found["device"], found["steps"], found["pairs"]) == ("cpu", 2, 16)
    assert found["pairs_per_second"] == pytest.approx(16 / found["seconds"])
    phases = found["phases"]
    assert sum(phases.values()) == pytest.approx(found["seconds"])
    parts = ("image_encoder", "text_encoder", "fusion", "image_decoder", "report_head", "rest")
    expected = ["data", *(f"forward, {part}" for part in parts), "backward", "optimizer"]
    assert list(phases) == [*expected, "everything else"]
    assert all(seconds > 0 for seconds in phases.values())
    names = {row["name"]: row for row in found["operators"]}
    assert names["aten::addmm"]["calls"] > 1 and not names.keys() & {"forward", "image_encoder"}
    assert sum(row["seconds"] for row in found["operators"]) <= found["seconds"]
    printed = capsys.readouterr().out
    assert "2 steps of 16 pairs on cpu" in printed and "forward, fusion" in printed
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert {"data", "image_encoder", "optimizer"} <= {event.get("name") for event in events}
    # The run that is profiled writes nothing itself.
    assert not (tmp_path / "run").exists()


def test_what_a_profile_needs(pretrain_argv, config_path, capsys):
    assert cli.main(["profile", str(config_path)]) == 2
    assert "data: expected the directory" in capsys.readouterr().err
    assert cli.main(["profile", *pretrain_argv("--profile_steps", "0")]) == 2
    assert "profile_steps" in capsys.readouterr().err
    assert cli.main(["profile", *pretrain_argv("--profil_steps", "3")]) == 2
    assert "unknown setting" in capsys.readouterr().err


class Sleepy(nn.Module):
    def forward(self, seconds):
        time.sleep(seconds)
        if seconds > 0.02:
            raise ValueError("too long")


def test_phases_count_while_they_are_asked_to():
    phases, module = Phases(torch.device("cpu")), Sleepy()
    phases.watch_module(module, "part")
    phases.watch_call(module, "forward", "call")
    module(0.01)
    assert not phases.seconds
    phases.counting = True
    with phases.phase("outer"):
        module(0.01)
    with pytest.raises(ValueError, match="too long"):
        module(0.03)
    assert 0.04 <= phases.seconds["call"] <= phases.seconds["part"]
    assert 0.01 <= phases.seconds["outer"] < phases.seconds["part"]


def test_phases_add_up():
    seconds = {"data": 1.0, "forward and backward": 10.0, "forward": 4.0, "optimizer": 2.0}
    seconds |= {"encoder": 3.0, "unused": 0.0}
    assert by_phase(seconds, ["encoder", "unused"], whole=20.0) == {
        "data": 1.0,
        "forward, encoder": 3.0,
        "forward, rest": 1.0,
        "backward": 6.0,
        "optimizer": 2.0,
        "everything else": 7.0,
    }
    assert by_phase(seconds, [], whole=20.0)["forward"] == 4.0
