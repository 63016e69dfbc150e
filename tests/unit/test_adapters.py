"""Adapters as directories: what the stages leave loads in PEFT and transformers unchanged, and goes in again."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from socket import gethostname
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common.files.fingerprints import checkpoint_fingerprint
from common.models import adapters
from common.models.adapters import config_of
from common.models.loading import LoadingError
from common.models.lora import adapter_parameters
from common.processes.shared_memory import Segment, SegmentReader, layout
from contracts.config import RoleLoraConfig, TandemConfig
from contracts.methods import chosen_preference
from contracts.records import PreferencePair
from controller.start_checks.adapter_checks import adapter_problems
from learner.ppo import PPOTask
from learner.preference import PreferenceTask
from learner.ranks import Ranks
from learner.reward_model import RewardModelTask
from learner.sft import SFTTask
from learner.weight_sources import EngineSource, stored_source
from reward_service.model import RewardModel, check_golden, check_reward_model
from tests.unit.test_lora_models import EXAMPLES, ROWS, logprobs, make_lora_config, padded_logprobs, ppo, randomise
from tests.unit.test_preference import pairs
from tests.unit.test_rank_state import commit, update, weights

__all__ = ["make_lora_config"]
PAIRS = [PreferencePair(ROWS[0], ROWS[1], 1.0), PreferencePair(ROWS[2], ROWS[1], 0.0)]


@pytest.fixture
def sft(make_lora_config: Callable[..., TandemConfig], ranks: Ranks, tmp_path: Path) -> tuple[SFTTask, Path]:
    task = SFTTask(ranks, make_lora_config(), EXAMPLES, [])
    randomise(task.engine, 3)
    task.save(str(tmp_path / "sft"))
    return task, tmp_path / "sft"


def test_a_policy_loads_in_peft_and_transformers_unchanged(sft: tuple[SFTTask, Path], small_vocab: Path) -> None:
    task, path = sft
    with torch.no_grad():
        expected = logprobs(task.engine)
        base = AutoModelForCausalLM.from_pretrained(small_vocab, dtype=torch.float32)
        in_peft = peft.PeftModel.from_pretrained(base, path)
        torch.testing.assert_close(padded_logprobs(in_peft), expected, rtol=0, atol=2e-5)
        in_transformers = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        torch.testing.assert_close(padded_logprobs(in_transformers), expected, rtol=0, atol=2e-5)
        merged = in_peft.merge_and_unload()
        torch.testing.assert_close(padded_logprobs(merged), expected, rtol=0, atol=2e-5)
    said = json.loads((path / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(small_vocab)
    assert (said["r"], said["lora_alpha"], said["task_type"]) == (4, 8, "CAUSAL_LM")
    mine, theirs = AutoTokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(small_vocab)
    assert mine("a b").input_ids == theirs("a b").input_ids
    assert adapters.split(str(path)) == (str(small_vocab), str(path))
    assert adapters.split(str(small_vocab)) == (str(small_vocab), None)


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_checkpoint_is_a_plain_one(
    dora: bool, make_lora_config: Callable[..., TandemConfig], ranks: Ranks, tmp_path: Path
) -> None:
    task = SFTTask(ranks, make_lora_config(dora=dora), EXAMPLES, [])
    randomise(task.engine, 3)
    task.save(str(tmp_path / "sft"))
    adapters.write_merged(str(tmp_path / "sft"), tmp_path / "whole")
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
        torch.testing.assert_close(padded_logprobs(whole), logprobs(task.engine), rtol=0, atol=5e-5)


def as_others_leave_it(base: Path, out: Path, **lora: Any) -> Path:
    """An adapter by PEFT alone, in a directory as trainers of others leave it: no tokenizer, files of training."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2, **lora))
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "training_args.bin").write_bytes(b"of training")
    (out / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    return out


def test_what_others_have_trained_is_merged_with_tokenizer_and_ends_of_its_base(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    generation = {"eos_token_id": [2, 5, 7], "temperature": 0.6, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(generation))
    adapter = as_others_leave_it(base, tmp_path / "adapter", target_modules=["q_proj"])
    adapters.write_merged(str(adapter), tmp_path / "whole")
    assert json.loads((tmp_path / "whole/generation_config.json").read_text()) == generation
    assert "quantization_config" not in json.loads((tmp_path / "whole/config.json").read_text())
    assert not (tmp_path / "whole/training_args.bin").exists()
    mine, theirs = AutoTokenizer.from_pretrained(tmp_path / "whole"), AutoTokenizer.from_pretrained(base)
    assert mine("a b").input_ids == theirs("a b").input_ids
    (base / "generation_config.json").unlink()  # then what ends a text stands in config.json alone
    adapters.write_merged(str(adapter), tmp_path / "without")
    assert not (tmp_path / "without/generation_config.json").exists()


@pytest.mark.parametrize("stage", ["sft", "preference", "ppo"])
@pytest.mark.parametrize("is_whole", [False, True])
def test_every_stage_names_the_ends_that_it_taught(
    is_whole: bool,
    stage: str,
    make_lora_config: Callable[..., TandemConfig],
    small_vocab: Path,
    ranks: Ranks,
    tmp_path: Path,
) -> None:
    """On a base whose tokenizer and files name <|endoftext|>, token 0, while its template ends answers with token 2."""
    base, config = tmp_path / "base", make_lora_config()
    shutil.copytree(small_vocab, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    config.model.path = str(base)
    if is_whole:
        config.model.lora = None
    task: Any = {
        "sft": lambda: SFTTask(ranks, config, EXAMPLES, []),
        "preference": lambda: PreferenceTask(ranks, config, chosen_preference(config), str(base), pairs(2)),
        "ppo": lambda: PPOTask(ranks, config, str(base), str(base), (0, 2), []),
    }[stage]()
    task.save(str(tmp_path / "saved"))
    if not is_whole:
        adapters.write_merged(str(tmp_path / "saved"), tmp_path / "whole")
    for name in ("saved",) if is_whole else ("saved", "whole"):
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    if stage == "ppo":
        commit(task, tmp_path / "step_1")
        named = json.loads((tmp_path / "step_1/policy/generation_config.json").read_text())["eos_token_id"]
        assert named == [0, 2]


def test_an_adapter_of_another_revision_is_refused(sft: tuple[SFTTask, Path]) -> None:
    _, path = sft
    said = json.loads((path / "adapter_config.json").read_text())
    for revision, named, is_refused in (("v2", "owner/name", True), ("main", "owner/name", False), ("v2", None, False)):
        changed = said | {"revision": revision} | ({"base_model_name_or_path": named} if named else {})
        (path / "adapter_config.json").write_text(json.dumps(changed))
        if is_refused:
            with pytest.raises(
                LoadingError, match="is an adapter of the revision 'v2' of owner/name; write the directory"
            ):
                adapters.split(str(path))
        else:
            assert adapters.split(str(path)) == (named or said["base_model_name_or_path"], str(path))


def test_an_adapter_on_a_tied_head_is_not_merged(tiny_model: Path, tmp_path: Path) -> None:
    adapter = as_others_leave_it(tiny_model, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(LoadingError, match="must leave lm_head as it is: it is LlamaForCausalLM's embedding too"):
        adapters.write_merged(str(adapter), tmp_path / "whole")


def test_a_tied_head_stays_with_its_embeddings(
    tiny_model: Path, make_lora_config: Callable[..., TandemConfig], ranks: Ranks, tmp_path: Path
) -> None:
    config = make_lora_config("bfloat16")
    config.model.path = str(tiny_model)  # PEFT resizes embeddings to the tokenizer's vocabulary
    task = SFTTask(ranks, config, EXAMPLES, [])
    randomise(task.engine, 3)
    task.save(str(tmp_path / "sft"))
    adapters.write_merged(str(tmp_path / "sft"), tmp_path / "whole")
    by_itself = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sft", dtype=torch.float32)
    with torch.no_grad():
        assert (padded_logprobs(by_itself) - logprobs(task.engine)).abs().mean() < 0.02  # of bfloat16
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_model, tmp_path / "whole"))
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert not torch.equal(after.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("zero", [0, 3])
def test_ppo_goes_on_from_an_adapter_which_is_its_reference(
    zero: int, sft: tuple[SFTTask, Path], make_lora_config: Callable[..., TandemConfig], ranks: Ranks
) -> None:
    task, path = sft
    config = make_lora_config(zero=zero)
    config.ppo.trainable_layers = 1
    found = ppo(ranks, config, str(path))
    with torch.no_grad():
        expected = logprobs(task.engine)
        assert torch.equal(logprobs(found.policy), expected)
    before = weights(found)
    for number in range(2):
        update(found, number)
    with torch.no_grad():
        assert torch.equal(logprobs(found.reference), expected)
        assert (logprobs(found.policy) - expected).abs().max() > 1e-3
    layers = {name: name.split(".")[3] for name in before if name.startswith("policy.")}
    assert {*layers.values()} == {"0", "1"}
    assert {layers[n] for n, p in weights(found).items() if n in layers and not torch.equal(p, before[n])} == {"1"}


@pytest.fixture
def proxy(make_lora_config: Callable[..., TandemConfig], ranks: Ranks, tmp_path: Path) -> tuple[RewardModelTask, Path]:
    config = make_lora_config()
    config.reward_model.optimizer.learning_rate = 1e-2
    config.reward_model.batch_size = 2
    task = RewardModelTask(ranks, config, config.model.path, PAIRS)
    for step in range(task.num_steps()):
        task.step(step)
    randomise(task.engine, 5)
    task.save(str(tmp_path / "proxy"))
    return task, tmp_path / "proxy"


def test_a_reward_model_is_served_and_loads_in_peft(proxy: tuple[RewardModelTask, Path], small_vocab: Path) -> None:
    task, path = proxy
    check_reward_model(str(path), "proxy_model")
    served = RewardModel(str(path), "float32")
    check_golden(str(path), served.score, 1e-4)
    scores = [score.value for score in served.score(ROWS)]
    said = json.loads((path / "tandem_adapter.json").read_text())["config"]
    raw = task.score(ROWS)  # its own normaliser is 0 and 1
    assert scores == pytest.approx([(r - said["score_mean"]) / said["score_std"] for r in raw], abs=1e-4)
    base = AutoModelForSequenceClassification.from_pretrained(small_vocab, num_labels=1, dtype=torch.float32)
    in_peft = peft.PeftModel.from_pretrained(base, path)
    with torch.no_grad():
        theirs = [in_peft(input_ids=torch.tensor([row])).logits.item() for row in ROWS]
    # transformers reads the last token that is no padding, and EOS is the padding of this model.
    assert theirs[1:] == pytest.approx(raw[1:], abs=1e-4)
    with pytest.raises(RuntimeError, match="size mismatch"):  # the base's configuration makes two labels
        peft.AutoPeftModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    by_itself = peft.AutoPeftModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        assert [by_itself(input_ids=torch.tensor([row])).logits.item() for row in ROWS] == pytest.approx(theirs)
    adapters.write_merged(str(path), path.parent / "whole")
    whole = RewardModel(str(path.parent / "whole"), "float32")
    assert [score.value for score in whole.score(ROWS)] == pytest.approx(scores, abs=1e-5)


def test_the_value_model_starts_from_a_reward_models_adapter(
    proxy: tuple[RewardModelTask, Path],
    sft: tuple[SFTTask, Path],
    make_lora_config: Callable[..., TandemConfig],
    ranks: Ranks,
) -> None:
    reward, path = proxy
    task = ppo(ranks, make_lora_config(), str(sft[1]), str(path))
    assert task.value is not None
    mine, theirs = (adapter_parameters(engine.model.lm) for engine in (task.value, reward.engine))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(task.value.model.lm.score.weight, reward.model.lm.score.weight)
    assert task.value.model.std == pytest.approx(config_of(str(path)).score_std)
    before = weights(task)
    update(task, 0)
    moved = {name for name, weight in weights(task).items() if not torch.equal(weight, before[name])}
    assert "value.score.weight" in moved
    assert "value.model.layers.0.mlp.up_proj.lora_B.default.weight" in moved


def test_dpo_goes_on_from_an_adapter(
    sft: tuple[SFTTask, Path], make_lora_config: Callable[..., TandemConfig], ranks: Ranks, tmp_path: Path
) -> None:
    config, items = make_lora_config(), pairs(6)
    config.preference.loss, config.preference.beta, config.preference.nll_coef = "dpo", 0.5, 0.0
    config.preference.batch_size, config.preference.epochs = 6, 3
    config.preference.optimizer.learning_rate, config.preference.optimizer.warmup_steps = 1e-2, 0
    task = PreferenceTask(ranks, config, config.preference, str(sft[1]), items)
    task.compute_reference(0, len(items))
    # Where policy and reference are one, every margin is 0: -(0.8 + 0.2) log sigmoid(0) = log 2.
    losses = [task.step(i)["preference/loss"] for i in range(task.num_steps())]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 0.1
    task.save(str(tmp_path / "dpo"))
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    with torch.no_grad():
        expected = padded_logprobs(peft.PeftModel.from_pretrained(base, tmp_path / "dpo"))
        torch.testing.assert_close(logprobs(task.engine), expected, rtol=0, atol=2e-5)


def test_an_evaluation_sends_what_the_learner_had_sent(
    sft: tuple[SFTTask, Path], make_lora_config: Callable[..., TandemConfig]
) -> None:
    task, path = sft
    model = make_lora_config().model
    sent, had = dict(stored_source(str(path), model)), dict(EngineSource(task.engine))
    assert sent.keys() == had.keys()
    assert [name for name in had if not torch.equal(sent[name], had[name])] == []
    assert dict(stored_source(model.path, model)) == {}
    empty = Segment(layout(())[1])  # in which such an update travels
    assert empty.begin()
    empty.commit(1)
    with SegmentReader(empty.address).read(1) as payload:
        assert payload.size == 0


# ---- refused


def test_an_adapter_of_another_base_is_named(
    sft: tuple[SFTTask, Path], make_lora_config: Callable[..., TandemConfig], tmp_path: Path
) -> None:
    config, path = make_lora_config(), str(sft[1])
    lora, base, other = config.model.lora, config.model.path, tmp_path / "other"
    assert lora is not None
    assert adapters.misfit(path, "sft_model", config.model) is None
    shutil.copytree(base, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(other)
    found = adapters.misfit(path, "sft_model", replace(config.model, path=str(other)))
    assert found is not None
    assert f"sft_model={path} must be an adapter of model.path={other}; found it was trained on" in found
    (
        Path(path) / "tandem_adapter.json"
    ).unlink()  # as of an adapter that PEFT has written: the base is found by its path
    assert adapters.misfit(path, "sft_model", config.model) is None
    found = adapters.misfit(path, "sft_model", replace(config.model, path=str(other)))
    assert found is not None
    assert "found it was trained on" in found
    lora.rank = 8
    found = adapters.misfit(path, "sft_model", config.model)
    assert found is not None
    assert "rank, 8; found 4; write model.lora={rank:4}" in found


def test_a_checkpoint_fits_the_roles_that_go_on_from_it(
    sft: tuple[SFTTask, Path],
    proxy: tuple[RewardModelTask, Path],
    classifier: Path,
    make_lora_config: Callable[..., TandemConfig],
) -> None:
    config, reward, policy = make_lora_config(), str(proxy[1]), str(sft[1])
    config.stage, roles = "ppo", config.model.lora_by_role

    def problem(key: str, path: str) -> str:
        return "\n".join(adapter_problems(config, key, path))

    assert problem("proxy_model", reward) == problem("sft_model", policy) == ""
    assert "proxy_model=" in problem("proxy_model", str(classifier))
    roles.value_model = RoleLoraConfig(rank=2)
    assert problem("sft_model", policy) == ""
    wrong = "must be an adapter with the value model's rank, 2; found 4; write model.lora_by_role.value_model={rank:4}"
    assert wrong in problem("proxy_model", reward)
    config.ppo.init_value_from = "policy"
    assert problem("proxy_model", reward) == problem("proxy_model", str(classifier)) == ""  # it only scores
    assert wrong in problem("sft_model", policy)
    roles.policy = RoleLoraConfig(rank=8)
    assert "rank, 8; found 4; write model.lora_by_role.policy={rank:4}" in problem("sft_model", policy)
    assert "or model.lora=null and model.lora_by_role.policy=null" in problem("sft_model", str(classifier))
    roles.policy = None
    assert problem("sft_model", str(classifier)).partition("\n")[0].endswith("or model.lora=null")
    # A value model with adapters beside a policy that trains itself has the base that it likes.
    config.model.lora, roles.value_model = None, RoleLoraConfig(rank=4, alpha=8.0)
    assert problem("sft_model", str(classifier)) == ""
    with pytest.raises(LoadingError, match=r"sft_model=.* must be a whole model; found an adapter of PEFT"):
        problem("sft_model", policy)
    config.ppo.init_value_from = "reward_model"
    assert problem("proxy_model", reward) == problem("proxy_model", str(classifier)) == ""
    # And one that trains itself beside adapters of the policy starts from no adapter.
    roles.policy, roles.value_model = RoleLoraConfig(rank=4, alpha=8.0), None
    assert problem("sft_model", policy) == problem("proxy_model", str(classifier)) == ""
    with pytest.raises(LoadingError, match=r"proxy_model=.* must be a whole model; found an adapter of PEFT"):
        problem("proxy_model", reward)


def test_another_base_is_another_checkpoint(sft: tuple[SFTTask, Path], small_vocab: Path, tmp_path: Path) -> None:
    path = sft[1]
    said = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": "../base"}))
    shutil.copytree(small_vocab, tmp_path / "base")
    assert adapters.split(str(path))[0] == str(path / "../base")
    before = checkpoint_fingerprint(str(path))
    assert checkpoint_fingerprint(str(path)) == before
    settings = tmp_path / "base/config.json"
    settings.write_text(settings.read_text() + " ")
    assert checkpoint_fingerprint(str(path)) != before


def test_a_base_that_is_not_there_is_named(sft: tuple[SFTTask, Path]) -> None:
    path = sft[1]
    said = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": "/not/there"}))
    with pytest.raises(LoadingError, match="is an adapter of /not/there, which is not there"):
        adapters.split(str(path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"modules_to_save": ["score", "embed_tokens"]}, "modules_to_save"),
    ],
)
def test_other_kinds_of_adapters_are_refused(change: dict[str, Any], named: str, sft: tuple[SFTTask, Path]) -> None:
    path = sft[1]
    said = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(said | change))
    with pytest.raises(LoadingError, match=f"must be a plain adapter of LoRA or DoRA; found.*{named}"):
        adapters.lora_of(str(path))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "PiSSA"])
def test_adapters_for_which_peft_changes_the_base_are_refused(init: str, sft: tuple[SFTTask, Path]) -> None:
    said = json.loads((sft[1] / "adapter_config.json").read_text())
    (sft[1] / "adapter_config.json").write_text(json.dumps(said | {"init_lora_weights": init}))
    with pytest.raises(LoadingError, match=f"init_lora_weights={init}, for which PEFT changes the base"):
        adapters.lora_of(str(sft[1]))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_other_beginnings_are_taken(init: Any, sft: tuple[SFTTask, Path]) -> None:
    said = json.loads((sft[1] / "adapter_config.json").read_text())
    (sft[1] / "adapter_config.json").write_text(json.dumps(said | {"init_lora_weights": init}))
    assert adapters.lora_of(str(sft[1])).rank == said["r"]


def test_a_reward_models_adapter_that_peft_has_written_is_read(
    small_vocab: Path, tmp_path: Path, make_lora_config: Callable[..., TandemConfig]
) -> None:
    """PEFT lists every name that a classifier's head may have."""
    lm = AutoModelForSequenceClassification.from_pretrained(small_vocab, num_labels=1)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    model = peft.get_peft_model(lm, settings)
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"classifier", "score"} <= {*said["modules_to_save"]}
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(lm.config)
        policy = AutoModelForCausalLM.from_config(lm.config)
    adapters.check_fits(classifier, str(tmp_path), "proxy_model", adapters.split(str(tmp_path))[0])
    with pytest.raises(
        LoadingError, match=r"sft_model=.* must be an adapter of a language model; found one of a reward"
    ):
        adapters.check_fits(policy, str(tmp_path), "sft_model", adapters.split(str(tmp_path))[0])
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
        plain = AutoModelForSequenceClassification.from_pretrained(small_vocab, num_labels=1)
        adapters.merge(plain, str(tmp_path))
        torch.testing.assert_close(plain(ids).logits, expected)
    adapters.write_merged(str(tmp_path), tmp_path / "whole")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["problem_type"] == "regression"  # else vLLM puts scores through a sigmoid


def test_an_adapters_base_by_another_name_is_known_by_its_weights(
    sft: tuple[SFTTask, Path], make_lora_config: Callable[..., TandemConfig], tmp_path: Path
) -> None:
    """A copy, with a tokenizer of another version; and a hub id that is not on this machine."""
    config, path = make_lora_config(), sft[1]
    (path / "tandem_adapter.json").unlink()
    shutil.copytree(config.model.path, tmp_path / "copy")
    (tmp_path / "copy/special_tokens_map.json").write_text("{}")
    model = replace(config.model, path=str(tmp_path / "copy"))
    assert adapters.misfit(str(path), "sft_model", model) is None
    said = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": "nobody/nothing"}))
    found = adapters.misfit(str(path), "sft_model", model)
    assert found is not None
    assert "found nobody/nothing has no weights on this machine to be compared with those of" in found


def test_without_lora_an_adapter_is_no_policy(
    sft: tuple[SFTTask, Path], make_lora_config: Callable[..., TandemConfig], ranks: Ranks
) -> None:
    config = make_lora_config()
    config.model.lora = None
    with pytest.raises(LoadingError, match="an adapter of PEFT; write"):
        PPOTask(ranks, config, str(sft[1]), str(sft[1]), (2,), [])


@pytest.mark.parametrize("path", ["/no/such/model", "./no_such_model", "no/such/model"])
def test_a_checkpoint_that_is_not_on_this_machine_is_said_with_the_machines_name(path: str) -> None:
    with pytest.raises(LoadingError, match=f"^{path} is not on {gethostname()}: a checkpoint must be where every node"):
        adapters.require_here(path)


def test_an_id_of_the_hub_need_not_be_on_this_machine() -> None:
    adapters.require_here("somebody/model")
    assert adapters.split("somebody/model") == ("somebody/model", None)
