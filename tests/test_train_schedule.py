"""Stages, learning rates and ramps."""

import pytest
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from surgery.recipe import Uptrain
from surgery.train.schedule import LAYER_LOCAL, LOGITS, Ramp, RampCallback, schedule


def made(**options):
    return schedule(Uptrain(**{"tokens": 100 * 8 * 64, "batch": 8, "layer_local": 0.1, **options}), 64, 192)


def test_stages_follow_each_other_and_share_the_tokens():
    stages = made(layer_local=0.1).stages
    assert [(s.name, s.begin, s.steps) for s in stages] == [(LAYER_LOCAL, 0, 10), (LOGITS, 10, 90)]
    assert [s.name for s in made(layer_local=0.0).stages] == [LOGITS]
    assert [s.name for s in made(layer_local=1.0).stages] == [LAYER_LOCAL]
    assert made(layer_local=0.1).stage(9).name == LAYER_LOCAL
    assert made(layer_local=0.1).stage(10).name == LOGITS


def test_learning_rate_follows_from_the_width_unless_named():
    assert made().stages[1].learning_rate == pytest.approx(0.06 / 192)
    named = made(learning_rate=2e-4, local_learning_rate=5e-3)
    assert [s.learning_rate for s in named.stages] == [5e-3, 2e-4]


@pytest.mark.parametrize("shape", ["wsd", "cosine"])
def test_each_stage_warms_up_and_ends_near_zero(shape):
    plan = made(layer_local=0.3, schedule=shape, warmup=0.1, learning_rate=1e-3, local_learning_rate=2e-3)
    for stage in plan.stages:
        rates = [plan.learning_rate(step) for step in range(stage.begin, stage.end)]
        assert max(rates) == pytest.approx(stage.learning_rate, rel=0.02)
        assert 0 < rates[0] < 0.4 * stage.learning_rate
        assert 0 < rates[-1] < 0.1 * stage.learning_rate
        assert rates.index(max(rates)) <= 0.1 * stage.steps


def test_wsd_is_constant_between():
    plan = made(layer_local=0.0, learning_rate=1e-3, warmup=0.1, decay=0.2)
    assert {plan.learning_rate(step) for step in range(10, 80)} == {1e-3}


def test_less_text_than_one_batch_still_makes_a_step():
    assert schedule(Uptrain(tokens=1), 64, 192).steps == 1


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def set_ramp(self, progress):
        self.seen.append(progress)


def test_a_ramp_reaches_the_modules_that_take_it_and_depends_on_the_step_alone(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), Mixed())
    callback = RampCallback(Ramp(begin=0.1, end=0.6))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for step in (0, 10, 35, 60, 99):
        state = TrainerState(global_step=step, max_steps=100)
        callback.on_step_begin(arguments, state, TrainerControl(), model=model)
    assert model[1].seen == pytest.approx([0, 0, 0.5, 1, 1])
