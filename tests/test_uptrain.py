"""Uptraining end to end, on tiny models: what is trained, what it learns from, resuming, refusals, faults."""

import dataclasses
import errno
import json
import shutil
from collections import UserDict

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainingArguments
from uptraining import losses, make_home, run

import surgery
from surgery.checkpoints.provenance import provenance_of
from surgery.errors import CheckpointError, RecipeError, UnsupportedModel
from surgery.runtime.attention import SHARED_STATES
from surgery.train import trainer as training
from surgery.train.checkpoints import checkpoints
from surgery.train.losses import Distilled, Head, distil
from surgery.train.parent import Parent, read_head
from surgery.train.parent_logits import KeptLogits
from surgery.train.prepare import check_separates, prepare
from surgery.train.run import weights_digest
from surgery.train.trainer import NonFinite, Uptrainer
from surgery.train.uptrain import train, uptrain


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("uptrain"))


@pytest.fixture(scope="module")
def finished_once(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    uptrain(run(home, out))
    return out


@pytest.fixture
def finished(finished_once, tmp_path):
    """The folder of a run of 10 steps that came to its end."""
    return shutil.copytree(finished_once, tmp_path / "finished")


@pytest.mark.parametrize(("model", "part"), [("native", 0.8), ("latent", 0.97), ("shared", 0.8)])
def test_training_comes_closer_to_the_parent_and_changes_converted_attention_only(home, tmp_path, model, part):
    out = tmp_path / "out"
    options = ("tokens=2560", "learning_rate=1e-2")
    summary = uptrain(run(home, out, *options, model=model, held_out=str(home / "held.jsonl")))
    assert summary["after"]["kl"] < part * summary["before"]["kl"]
    assert summary["steps"] == 40
    before, after = surgery.load(home / model), surgery.load(out / "model")
    assert type(after) is type(before)
    converted = "model.layers.1.self_attn" if model == "latent" else ".self_attn."
    old = before.state_dict()
    for name, tensor in after.state_dict().items():
        trained = converted in name and tensor.is_floating_point()
        assert torch.equal(tensor, old[name]) != trained, name
    record = provenance_of(after)["uptrained"]
    assert record[0]["tokens"] == 2560
    assert record[0]["data"]["documents"] == 60
    assert record[0]["data"]["start"] == []
    assert (out / "model" / "tokenizer.json").is_file()
    assert surgery.Recipe.load(out / "model" / "recipe.yaml").uptrain.tokens == 2560
    again = prepare(run(home, tmp_path / "again", model=model)).origin
    assert "uptrained" not in again


def test_a_trained_model_can_be_trained_on(home, tmp_path, finished):
    uptrain(dataclasses.replace(run(home, tmp_path / "b"), model=str(finished / "model")))
    assert len(provenance_of(surgery.load(tmp_path / "b" / "model"))["uptrained"]) == 2


def trainer_of(home, tmp_path, *overrides, model="native", **options):
    """The Trainer of a run as it stands before the first step."""
    made = {}

    class Stop(Exception):
        pass

    def go(self, resume):
        made["trainer"] = self
        raise Stop

    setup = prepare(run(home, tmp_path / "out", *overrides, model=model, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Uptrainer, "go", go)
        with pytest.raises(Stop):
            train(setup)
    return made["trainer"], setup


def test_trainer_does_not_split_batches_over_the_gpus_of_a_machine(home, tmp_path, monkeypatch, caplog):
    class FourGpus(TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 4

    monkeypatch.setattr("surgery.train.uptrain.TrainingArguments", FourGpus)
    assert trainer_of(home, tmp_path)[0].args.n_gpu == 1
    assert "one of 4 GPUs is used: start training by accelerate launch" in caplog.text


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model", ["native", "latent", "shared"])
def test_layer_local_loss_is_the_error_of_each_attention_on_the_parents_own_inputs(home, tmp_path, model):
    trainer, setup = trainer_of(home, tmp_path, model=model)
    inputs = next(iter(trainer.text))
    found = trainer.compute_loss(trainer.model, dict(inputs))
    found.backward()
    trainer.remove_hooks()
    grads = gradients(setup.model)

    parent = surgery.load(home / "parent").eval()
    calls = {}

    def record(name):
        def hook(module, args, kwargs, output):
            calls[name] = args, kwargs, output[0]

        return hook

    for name in setup.trained_attention:
        parent.get_submodule(name).register_forward_hook(record(name), with_kwargs=True)
    read = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    with torch.no_grad():
        parent(**read, use_cache=False)
    wanted = 0.0
    setup.model.zero_grad()
    states = UserDict()
    for name in setup.trained_attention:
        args, kwargs, target = calls[name]
        if model == "shared":
            kwargs = {**kwargs, SHARED_STATES: states}
        y = setup.model.get_submodule(name)(*args, **kwargs)[0]
        wanted = wanted + (y - target).square().sum() / trainer.local[name]
    wanted = wanted / (64 * len(setup.trained_attention))
    wanted.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert grads.keys() == gradients(setup.model).keys()
    for name, grad in gradients(setup.model).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("model", ["native", "latent", "shared"])
def test_a_parent_that_shares_weights_teaches_the_same_and_holds_attention_alone(home, tmp_path, model):
    found = {}
    for shared in (True, False):
        trainer, setup = trainer_of(home, tmp_path, "layer_local=0", model=model, share_parent=shared)
        inputs = next(iter(trainer.text))
        count = (inputs["labels"] != -100).sum()
        loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=count)
        loss.backward()
        found[shared] = loss.detach(), gradients(setup.model), setup.parent.bytes
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-6)
    for name, grad in found[True][1].items():
        torch.testing.assert_close(grad, found[False][1][name], rtol=1e-4, atol=1e-6)
    parent = surgery.load(home / "parent")
    names = setup.trained_attention
    assert found[True][2] == sum(p.numel() * 4 for n in names for p in parent.get_submodule(n).parameters())
    assert found[False][2] == sum(p.numel() * 4 for p in parent.parameters())


def test_the_loss_is_the_divergence_from_the_parent_per_predicted_token(home, tmp_path):
    trainer, _ = trainer_of(home, tmp_path, "layer_local=0")
    inputs = next(iter(trainer.text))
    labels = inputs["labels"]
    wanted = labels[:, 1:] != -100
    found = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=wanted.sum())
    read = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    with torch.no_grad():
        logp = [m(**read, use_cache=False).logits[:, :-1][wanted].log_softmax(-1)
                for m in (surgery.load(home / "parent"), surgery.load(home / "native"))]  # fmt: skip
    kl = (logp[0].exp() * (logp[0] - logp[1])).sum(-1).mean()
    torch.testing.assert_close(found, kl, rtol=1e-4, atol=1e-6)


def test_the_divergence_that_is_reported_is_that_at_temperature_1(home, tmp_path):
    held = {"held_out": str(home / "held.jsonl")}
    made = {t: trainer_of(home, tmp_path / t, "layer_local=0", f"temperature={t}", **held) for t in ("1", "4")}
    scores = [trainer.score(setup.held_out) for trainer, setup in made.values()]
    assert scores[0] == scores[1]


def test_the_section_of_another_recipe_may_not_ask_for_what_the_models_own_steps_do_not_have(home, tmp_path):
    other = {"steps": [{"rewriter": "dms", "window": 4, "ratio": 2}], "uptrain": {"tokens": 640, "gate_ramp": 0.5}}
    (tmp_path / "other.yaml").write_text(json.dumps(other))
    with pytest.raises(RecipeError, match="gate_ramp: no step of the recipe has gates"):
        prepare(run(home, tmp_path / "out", recipe=str(tmp_path / "other.yaml")))


@pytest.mark.parametrize("model", ["parent", "native", "latent"])
def test_packed_documents_do_not_see_each_other(home, tmp_path, model):
    loaded = surgery.load(home / model).eval()
    check_separates(loaded)
    trainer, _ = trainer_of(home, tmp_path)
    inputs = next(iter(trainer.text))
    packed = loaded(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
    for row in range(4):
        starts = [i for i, p in enumerate(inputs["position_ids"][row].tolist()) if p == 0]
        for begin, end in zip(starts, [*starts[1:], 16], strict=True):
            alone = loaded(input_ids=inputs["input_ids"][row : row + 1, begin:end], use_cache=False).logits[0]
            torch.testing.assert_close(packed[row, begin:end], alone, rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_keep_documents_apart_is_refused(home):
    model = tiny_model("gpt2")  # learned positions, and a mask that knows them: fine
    check_separates(model)
    model.forward = lambda **kwargs: type(model).forward(model, **{**kwargs, "position_ids": None})
    with pytest.raises(UnsupportedModel, match="separate_documents=false"):
        check_separates(model)


@pytest.mark.parametrize("mode", ["attention", "all"])
def test_what_trains_is_what_the_recipe_names(home, tmp_path, mode):
    out = tmp_path / "out"
    summary = uptrain(run(home, out, f"train={mode}", model="latent"))
    before, after = surgery.load(home / "latent").state_dict(), surgery.load(out / "model").state_dict()
    for name, tensor in after.items():
        trained = tensor.is_floating_point() and (mode == "all" or ".self_attn." in name)
        assert torch.equal(tensor, before[name]) != trained, name
    assert (summary["parameters"]["other"]["trained"] > 0) == (mode == "all")


def test_only_attention_moves_in_the_layer_local_stage_of_a_run_that_trains_all(home, tmp_path):
    out = tmp_path / "out"
    uptrain(run(home, out, "train=all", "layer_local=1"))
    before, after = surgery.load(home / "native").state_dict(), surgery.load(out / "model").state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (".self_attn." not in name), name


def test_adapters_are_saved_beside_their_base_and_merged_on_export(home, tmp_path):
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    summary = uptrain(run(home, out, "train=lora", "lora_rank=2", model="latent"))
    assert summary["parameters"]["LoRA"]["trained"] > 0
    assert summary["parameters"]["converted attention"]["trained"] == 0
    ids = torch.arange(3, 20)[None]
    merged = surgery.load(out / "model")
    adapted = peft.PeftModel.from_pretrained(surgery.load(out / "base"), out / "adapter")
    base = surgery.load(home / "latent")
    with torch.no_grad():
        wanted, found, old = (m.eval()(input_ids=ids, use_cache=False).logits for m in (adapted, merged, base))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, old, atol=1e-3)
    assert merged.state_dict().keys() == base.state_dict().keys()


def test_the_base_of_a_controls_adapters_is_the_parent(home, tmp_path):
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    shutil.copytree(home / "latent", out / "base")  # left behind by a run that was ended before its first checkpoint
    uptrain(run(home, out, "tokens=128", "train=lora", "lora_rank=2", control=True))
    adapted = peft.PeftModel.from_pretrained(surgery.load(out / "base"), out / "adapter")
    base = adapted.get_base_model()
    assert (type(base).__name__, base.config.num_key_value_heads) == ("LlamaForCausalLM", 2)
    assert adapted.peft_config["default"].base_model_name_or_path == str(home / "parent")


def test_the_config_says_of_the_cache_what_the_models_own_said(home, finished, tmp_path):
    folders = [*checkpoints(finished / "checkpoints"), finished / "model"]
    assert len(folders) > 1
    for folder in folders:
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    shutil.copytree(home / "native", tmp_path / "home" / "native")
    config = tmp_path / "home" / "native" / "config.json"
    config.write_text(config.read_text().replace('"use_cache": true', '"use_cache": false'))
    uptrain(run(home, tmp_path / "out", "tokens=64", model=tmp_path / "home" / "native"))
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["use_cache"] is False


def test_a_parent_whose_adapter_was_merged_teaches_with_the_adapter(home, tmp_path):
    peft = pytest.importorskip("peft")
    shutil.copytree(home / "parent", tmp_path / "base")
    surgery.load(home / "parent").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = surgery.load(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    recipe = provenance_of(surgery.load(home / "native"))["recipe"]
    for name, given in (("memory", adapted), ("folder", tmp_path / "adapter")):
        surgery.save(surgery.convert(given, recipe, merge_adapter=True), tmp_path / name)
    teacher = prepare(run(home, tmp_path / "out", model=tmp_path / "folder", share_parent=False)).parent
    taught = teacher.attention["model.layers.0.self_attn"].q_proj.weight
    merged = surgery.load(tmp_path / "adapter", merge_adapter=True).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(taught, merged.float())
    assert not torch.equal(taught, surgery.load(tmp_path / "base").model.layers[0].self_attn.q_proj.weight.float())
    with pytest.raises(CheckpointError, match=r"with an adapter \(LORA default\) merged in memory"):
        prepare(run(home, tmp_path / "out", model=tmp_path / "memory"))


def test_a_control_trains_the_parent_on_the_same_text(home, tmp_path):
    out = tmp_path / "out"
    summary = uptrain(run(home, out, control=True, held_out=str(home / "held.jsonl")))
    trained, parent = surgery.load(out / "model"), surgery.load(home / "parent")
    assert trained.config.num_key_value_heads == parent.config.num_key_value_heads == 2
    assert summary["after"]["nats_per_token"] < summary["before"]["nats_per_token"]
    assert summary["uptrain"]["ce"] == 1.0


@pytest.mark.parametrize("overrides", [(), ("train=lora",)], ids=["converted", "lora"])
def test_an_interrupted_run_continues_bit_for_bit(home, tmp_path, finished, monkeypatch, overrides):
    whole, broken = finished, tmp_path / "broken"
    if overrides:
        whole = tmp_path / "whole"
        uptrain(run(home, whole, *overrides))
    step = Uptrainer.training_step

    def die(self, *args, **kwargs):
        if self.state.global_step == 6:  # behind the checkpoint of step 4
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Uptrainer, "training_step", die)
    with pytest.raises(KeyboardInterrupt):
        uptrain(run(home, broken, *overrides))
    assert [p.name for p in checkpoints(broken / "checkpoints")] == ["checkpoint-4"]
    monkeypatch.undo()
    torch.manual_seed(12345)
    uptrain(run(home, broken, *overrides))
    assert losses(broken) == losses(whole)
    assert len(losses(whole)) == 10
    a, b = (surgery.load(out / "model").state_dict() for out in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_accumulation_changes_nothing_but_rounding(home, tmp_path, finished):
    uptrain(run(home, tmp_path / "parts", micro_batch=1))
    assert len(losses(finished)) == 10
    for a, b in zip(losses(finished), losses(tmp_path / "parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_recomputing_activations_changes_nothing_but_rounding(home, tmp_path, finished):
    uptrain(run(home, tmp_path / "recomputed", checkpointing=True))
    assert len(losses(finished)) == 10
    for a, b in zip(losses(finished), losses(tmp_path / "recomputed"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_a_finished_run_is_not_trained_again(home, finished, monkeypatch):
    first = surgery.load(finished / "model").state_dict()
    shutil.rmtree(finished / "model")
    monkeypatch.setattr(Uptrainer, "training_step", None)
    summary = uptrain(run(home, finished))
    assert summary["steps"] == 10
    again = surgery.load(finished / "model").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_half_written_checkpoint_is_never_resumed_from(home, tmp_path, monkeypatch):
    out = tmp_path / "out"
    save = training.PackedText.save

    def die(self, folder, step, rank):
        if step == 8:
            raise KeyboardInterrupt  # as good as kill -9: nothing below runs
        save(self, folder, step, rank)

    monkeypatch.setattr(training.PackedText, "save", die)
    with pytest.raises(KeyboardInterrupt):
        uptrain(run(home, out))
    written = out / "checkpoints" / ".saving" / "checkpoint-8"
    assert (written / "model.safetensors").is_file()
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["checkpoint-4"]
    monkeypatch.undo()
    uptrain(run(home, out))
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["checkpoint-8", "checkpoint-10"]
    assert not written.exists()


def test_a_full_disk_keeps_the_last_checkpoint(home, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = torch.save

    def full(data, file, *args, **kwargs):
        if "checkpoint-8" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(data, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"the disk is full.*checkpoint-4") as caught:
        uptrain(run(home, out))
    assert "resume" in str(caught.value)
    monkeypatch.undo()
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["checkpoint-4"]
    assert not (out / "checkpoints" / ".saving").exists()
    assert uptrain(run(home, out))["steps"] == 10


@pytest.mark.parametrize(
    ("options", "overrides", "named"),
    [
        ({}, ("learning_rate=1e-3",), "uptrain.learning_rate was 0.005, is 0.001"),
        ({"seed": 1}, (), "seed was 0, is 1"),
        ({"model": "latent"}, (), "model was"),
        ({"data": "held.jsonl"}, (), "data was"),
        ({"held_out": "held.jsonl"}, (), "held_out was None, is"),  # else a score before would be of another text
    ],
)
def test_resuming_another_run_is_refused_unless_forced(home, finished, options, overrides, named):
    options = {name: str(home / value) if name != "seed" else value for name, value in options.items()}
    changed = run(home, finished, *overrides, **options)
    with pytest.raises(CheckpointError, match=named):
        uptrain(changed)
    if "seed" in options:
        assert uptrain(dataclasses.replace(changed, force=True))["steps"] == 10


def test_a_checkpoint_of_no_known_run_is_refused_unless_forced(home, finished):
    (finished / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"there is no .*run.json.*--force"):
        uptrain(run(home, finished))
    assert uptrain(run(home, finished, force=True))["steps"] == 10


def test_weights_lie_in_the_types_in_which_they_lay(home, tmp_path):
    """A checkpoint in bfloat16 with some tensors in float32, which bfloat16 would round."""
    shutil.copytree(home / "native", tmp_path / "mixed")
    file = tmp_path / "mixed" / "model.safetensors"
    old = load_file(file)
    fine = {"model.norm.weight", "model.layers.0.self_attn.q_proj.weight"}
    old = {name: (t + 1e-5 if name in fine else t.bfloat16()) for name, t in old.items()}
    save_file(old, file, {"format": "pt"})
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    (tmp_path / "mixed" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    made = run(home, tmp_path / "out", "tokens=64", "layer_local=0", force=True)
    uptrain(dataclasses.replace(made, model=str(tmp_path / "mixed")))
    new = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {name: t.dtype for name, t in new.items()} == {name: t.dtype for name, t in old.items()}
    assert torch.equal(new["model.norm.weight"], old["model.norm.weight"])
    assert surgery.load(tmp_path / "out" / "model").dtype == torch.bfloat16


def test_a_checkpoint_is_of_the_run_that_wrote_it_wherever_the_result_goes(home, tmp_path, finished):
    last = str(checkpoints(finished / "checkpoints")[-1])
    with pytest.raises(CheckpointError, match="of another run.*uptrain.learning_rate was"):
        uptrain(run(home, tmp_path / "elsewhere", "learning_rate=1e-3", resume=last))


def test_a_parent_whose_weights_changed_meanwhile_is_another_one(home, tmp_path):
    parent = shutil.copytree(home / "parent", tmp_path / "parent")
    made = run(home, tmp_path / "out", "tokens=128", parent=str(parent), keep_logits=8)
    uptrain(made)
    other = surgery.load(parent)
    other.model.layers[0].self_attn.q_proj.weight.data.mul_(2)
    other.save_pretrained(parent)
    with pytest.raises(CheckpointError, match="parent_weights was"):
        uptrain(made)
    with pytest.raises(CheckpointError, match="Remove the folder"):  # of what the parent said
        uptrain(dataclasses.replace(made, force=True))


def test_the_digest_of_weights_reads_all_through_a_file(tmp_path):
    found = set()
    for value in (0, 1):
        middle = torch.full((4096, 1024), value, dtype=torch.uint8)
        ends = {"a": torch.zeros(2**21, dtype=torch.uint8), "z": torch.zeros(2**21, dtype=torch.uint8)}
        save_file({**ends, "m": middle}, tmp_path / "model.safetensors")
        found.add(weights_digest(tmp_path))
    assert len(found) == 2


def test_a_forced_run_has_the_rates_that_it_was_given(home, finished):
    shutil.rmtree(checkpoints(finished / "checkpoints")[-1])
    made = dataclasses.replace(run(home, finished, "learning_rate=1e-3", "weight_decay=0.5"), force=True)
    uptrain(made)
    *_, told = losses(finished)
    assert told["step"] == 10
    assert told["learning_rate"] == pytest.approx(prepare(made).schedule.learning_rate(9))
    state = torch.load(checkpoints(finished / "checkpoints")[-1] / "optimizer.pt", weights_only=True)
    assert max(group["weight_decay"] for group in state["param_groups"]) == 0.5


def test_a_new_start_beside_old_checkpoints_is_refused(home, tmp_path, finished):
    with pytest.raises(CheckpointError, match="holds checkpoints"):
        uptrain(run(home, finished, resume=None))
    with pytest.raises(CheckpointError, match="no checkpoint of a training run"):
        uptrain(run(home, tmp_path / "out", resume=str(tmp_path)))


def broken_distil(monkeypatch, at, seen):
    """`distil` with a NaN in it at the calls `at`."""
    real = distil

    def sometimes(h, *args, **kwargs):
        found = real(h, *args, **kwargs)
        seen.append(1)
        return Distilled(found.total * float("nan"), *found[1:]) if len(seen) in at else found

    monkeypatch.setattr(training, "distil", sometimes)


def test_a_step_that_is_not_finite_is_left_out_and_told(home, tmp_path, monkeypatch):
    seen = []
    broken_distil(monkeypatch, {3}, seen)
    out = tmp_path / "out"
    summary = uptrain(run(home, out, "layer_local=0"))
    assert summary["skipped_steps"] == 1
    (file,) = (out / "checkpoints").glob("nonfinite-step-*.json")
    assert file.name == "nonfinite-step-3-0.json"
    ids = torch.tensor(json.loads(file.read_text())["input_ids"])
    text = iter(trainer_of(home, tmp_path / "x")[0].text)
    assert torch.equal(ids, [next(text) for _ in range(3)][2]["input_ids"])
    for tensor in surgery.load(out / "model").state_dict().values():
        assert torch.isfinite(tensor).all()
    told = {entry["step"]: entry for entry in losses(out)}
    assert told[3]["not_finite"] == 1
    monkeypatch.undo()
    trainer = trainer_of(home, tmp_path / "y", "layer_local=0")[0]
    trainer.training_step(trainer.model, next(iter(trainer.text)), torch.tensor(60))
    assert trainer._sums["not_finite"] == 0  # devices add up the same sums, whichever of them met one


def test_training_stops_when_steps_keep_being_not_finite(home, tmp_path, monkeypatch):
    seen = []
    broken_distil(monkeypatch, {6, 7}, seen)
    with pytest.raises(NonFinite, match=r"step 7: .* 2 times"):
        uptrain(run(home, tmp_path / "out", "layer_local=0", nonfinite_limit=2))
    assert [p.name for p in checkpoints(tmp_path / "out" / "checkpoints")] == ["checkpoint-4"]


def other_parent(tmp_path, home, **changes):
    model = tiny_model("llama")
    config = model.config
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    type(model)(config).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("native", {"vocab_size": 136}, "vocab_size is 136, the model has 128: not its parent"),
        ("native", {"num_hidden_layers": 3}, "num_hidden_layers is 3"),
        ("latent", {"intermediate_size": 80}, "intermediate_size is 80"),
        ("latent", {"num_key_value_heads": 4}, "layer 0 has kv_heads 4, the model was converted from one with 2"),
        ("native", {}, "differs from the model's, though conversion leaves it alone"),
    ],
)
def test_a_parent_of_another_kind_is_refused(home, tmp_path, model, changes, message):
    with pytest.raises(CheckpointError, match=message):
        prepare(run(home, tmp_path / "out", model=model, parent=other_parent(tmp_path, home, **changes)))


def test_a_parent_of_another_architecture_is_refused(home, tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path / "qwen")
    with pytest.raises(CheckpointError, match="is a Qwen2ForCausalLM, the model was converted from a LlamaForCausalLM"):
        prepare(run(home, tmp_path / "out", parent=str(tmp_path / "qwen")))


def test_a_parent_with_other_weights_can_be_forced_but_not_shared(home, tmp_path):
    options = {"parent": other_parent(tmp_path, home), "force": True}
    setup = prepare(run(home, tmp_path / "out", "layer_local=0", **options))
    assert not setup.parent.shared
    with pytest.raises(RecipeError, match="layer_local"):
        prepare(run(home, tmp_path / "out", **options))
    with pytest.raises(RecipeError, match="--share-parent"):
        prepare(run(home, tmp_path / "out", "layer_local=0", share_parent=True, **options))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("tokns=5",), "Did you mean 'tokens'"),
        (("kl=0", "ce=0"), "the second stage would learn nothing"),
        (("layer_local=2",), "give 0 to 1"),
        (("train=lora", "lora_targets=[q_prj]"), "no linear layer is called q_prj"),
        (("train=lora", "lora_targets=[q_proj, lm_head]"), "lm_head makes the logits"),
        (("gate_ramp=0.5",), "gate_ramp: no step of the recipe has gates"),
    ],
)
def test_a_wrong_option_is_refused_before_work(home, tmp_path, overrides, message):
    with pytest.raises(RecipeError, match=message):
        prepare(run(home, tmp_path / "out", *overrides))
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_or_that_was_not_converted_is_refused(home, tmp_path):
    shutil.copytree(home / "native", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match="no tokenizer lies beside the model"):
        prepare(dataclasses.replace(run(home, tmp_path / "out"), model=str(tmp_path / "bare")))
    with pytest.raises(CheckpointError, match="not converted by surgery"):
        prepare(run(home, tmp_path / "out", model="parent"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
def test_the_head_is_read_with_its_scale_and_soft_cap(family):
    model = tiny_model(family).eval()
    scale, softcap = read_head(model)
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        made = Head(weight_VD=model.get_output_embeddings().weight, scale=scale, softcap=softcap)(seen[0])
    torch.testing.assert_close(made, logits, rtol=1e-3, atol=1e-3)
    assert (softcap is not None) == (family == "gemma2")


def test_a_head_of_another_form_is_refused():
    model = tiny_model("llama")
    model.get_output_embeddings().register_forward_hook(lambda _, args, output: output.square())
    with pytest.raises(UnsupportedModel, match="output embedding"):
        read_head(model)


def test_kept_logits_replace_the_parent_from_the_second_epoch_on(home, tmp_path, monkeypatch):
    runs = []
    last_hidden = Parent.last_hidden

    def counted(self, *args):
        runs.append(1)
        return last_hidden(self, *args)

    monkeypatch.setattr(Parent, "last_hidden", counted)
    options = ("layer_local=0", "tokens=2560")
    uptrain(run(home, tmp_path / "a", *options))
    assert len(runs) == 40
    runs.clear()
    uptrain(run(home, tmp_path / "kept", *options, keep_logits=128))
    assert 0 < len(runs) < 30
    kept, plain = losses(tmp_path / "kept"), losses(tmp_path / "a")
    for a, b in zip(kept[:5], plain[:5], strict=True):  # later epochs of the plain run are shuffled anew
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
        assert a["parent_nll"] == pytest.approx(b["parent_nll"], rel=1e-4)
    with pytest.raises(RecipeError, match="--keep-logits"):
        prepare(run(home, tmp_path / "b", "hidden=1", keep_logits=8))


def test_a_run_with_kept_logits_continues_bit_for_bit_and_refuses_those_of_another_parent(home, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    uptrain(run(home, whole, keep_logits=8))
    uptrain(run(home, broken, keep_logits=8))
    shutil.rmtree(checkpoints(broken / "checkpoints")[-1])
    uptrain(run(home, broken, keep_logits=8))
    assert losses(broken) == losses(whole)
    with pytest.raises(CheckpointError, match="Remove the folder"):
        KeptLogits(whole / "parent-logits", k=9, temperature=1.0, parent="p")


@pytest.mark.parametrize("shared", [True, False])
def test_a_parent_in_bfloat16_teaches_a_model_in_float32_under_autocast(home, tmp_path, shared):
    made = run(home, tmp_path / "out", "tokens=2560", bf16=True, share_parent=shared, held_out=str(home / "held.jsonl"))
    setup = dataclasses.replace(prepare(made), dtype=torch.bfloat16)
    summary = train(setup)
    assert {p.dtype for module in setup.parent.attention.values() for p in module.parameters()} == {torch.bfloat16}
    assert summary["after"]["kl"] < 0.8 * summary["before"]["kl"]
    plain = uptrain(run(home, tmp_path / "plain", "tokens=2560", held_out=str(home / "held.jsonl")))
    assert summary["before"]["kl"] == pytest.approx(plain["before"]["kl"], rel=0.05)
    assert surgery.load(tmp_path / "out" / "model").dtype == torch.bfloat16


@pytest.mark.parametrize(("model", "part"), [("native", 0.1), ("latent", 0.0)])
def test_layers_that_calibration_has_fitted_are_not_fitted_again_unless_asked_for(home, tmp_path, model, part):
    made = run(home, tmp_path / "out", model=model)
    options = tuple(option for option in made.overrides if "layer_local" not in option)
    assert prepare(dataclasses.replace(made, overrides=options)).uptrain.layer_local == part
    assert prepare(made).uptrain.layer_local == 0.2


def test_ids_that_the_model_does_not_know_are_refused_while_preparing(home, tmp_path):
    shutil.copytree(home / "native", tmp_path / "native")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "native")
    tokenizer.add_tokens([f"x{i}" for i in range(123, 129)])  # x128 is one too many
    tokenizer.save_pretrained(tmp_path / "native")
    made = dataclasses.replace(run(home, tmp_path / "out"), model=str(tmp_path / "native"))
    assert prepare(made).schedule.steps == 10
    rows = (home / "text.jsonl").read_text().splitlines()
    rows[7] = json.dumps({"text": "w1 w2 x128 w3"})
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    for options, where in (
        ({"data": str(tmp_path / "text.jsonl")}, "training text, document 8"),
        ({"held_out": str(tmp_path / "text.jsonl")}, "held-out text, document 8"),
    ):
        with pytest.raises(CheckpointError, match=rf"{where}: token id 128 \('x128'\), but the model knows 128"):
            prepare(dataclasses.replace(made, **options))
    tokenizer.eos_token = "x128"  # what every document would end with
    tokenizer.save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError, match=r"training text, document \d+: token id 128"):
        uptrain(made)
    assert not (tmp_path / "out").exists()


def test_sequences_longer_than_the_models_positions_are_refused(home, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"uptrain\.length: windows of 300 tokens, but the model has 256 positions"
    ):
        prepare(run(home, tmp_path / "out", "length=300"))
