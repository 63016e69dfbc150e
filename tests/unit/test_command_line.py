"""All that is wrong with a command line is said at once: unknown keys, wrong types, conflicts, also of a sweep's members."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from common.command_line import TAKE_VALUE, command_line_problems, flags_first, whole_sections
from contracts.config import register_schema, to_config
from controller.record.reader import read
from controller.report.members import Member

CONF = Path(__file__).parents[2] / "conf"
UNKNOWN = "ppo.updats is not a key of the configuration; write ppo.updates"


def problems(*arguments: str) -> list[str]:
    return command_line_problems(list(arguments), CONF)


def test_a_well_formed_command_line_is_left_to_hydra() -> None:
    assert problems() == []
    assert problems("seed=2", "cluster=laptop", "+experiment=grpo", "--cfg", "job", "hydra.run.dir=x") == []
    assert problems("ppo.clip=2") == []  # `validate` says this one
    assert problems("data.gold=null", "model.revision=null", "cache_dir=${oc.env:HOME}/c", "~environment") == []


def test_unknown_keys_wrong_types_and_conflicts_come_together() -> None:
    assert problems("ppo.updats=3", "ppo.epochs=many", "learner.zero_stage=7", "ppo.clip=2") == [
        UNKNOWN,
        "ppo.epochs must be a whole number; found many; write for example 1 (the default)",
        "learner.zero_stage must be one of 0, 1, 2, 3; found 7; write for example 0",
        "ppo.clip must be in (0, 1); found 2.0; write for example 0.2 (the default)",
    ]


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("ppo.kl.coef=high", "ppo.kl.coef must be a number; found high; write for example 0.05 (the default)"),
        ("ppo.seed=1.5", "ppo.seed must be a whole number or null; found 1.5; write for example null (the default)"),
        ("data.chat=perhaps", "data.chat must be true or false; found perhaps; write for example False (the default)"),
        ("ppo.epochs=null", "ppo.epochs must be a whole number; found None; write for example 1 (the default)"),
        ("data.gold.max_rows=x", "data.gold.max_rows must be a whole number or null; found x; write for example null"),
        ("ppo.kl=0.1", "ppo.kl must be a section with keys of its own; found 0.1; write"),
        ("ppo.optimizer.betas=[a,b]", "ppo.optimizer.betas must be a list of numbers; found ['a', 'b']; write for"),
    ],
)
def test_each_type_in_words(override: str, kind: str) -> None:
    [text] = problems(override)
    assert text.startswith(kind)


@pytest.mark.parametrize(
    ("written", "read"), [("12e4567", "inf"), ("1.10", "1.1"), ("1_000", "1000"), ("true", "True"), ("1e5", "100000.0")]
)
def test_a_text_that_is_read_as_something_else_is_refused(written: str, read: str) -> None:
    instead = f"write model.revision='\"{written}\"'"
    assert problems(f"model.revision={written}") == [
        f"model.revision must be a text; found {written}, which is read as {read}; {instead}"
    ]
    assert problems(f'model.revision="{written}"') == []


def test_a_text_that_reads_as_it_is_written_needs_no_quotes() -> None:
    assert problems("model.revision=1234567", "model.revision=0123456", "name=7", "sft_model=null") == []


def test_a_torn_override_is_named() -> None:
    [text] = problems("ppo.optimizer.betas=[0.9")
    assert "ppo.optimizer.betas" in text or "[0.9" in text
    member = "runs/x/0-ppo.kl.coef=0.02,ppo.seed=1"
    [text] = problems("seed=2", f"run_dir={member}")
    assert text == f"run_dir: mismatched input '=' expecting <EOF>; write run_dir='\"{member}\"'"
    assert problems("seed=2", f'run_dir="{member}"') == []


def test_every_member_of_a_sweep_is_checked_before_the_first_runs() -> None:
    assert problems("-m", "ppo.kl.coef=0.02,0.05", "ppo.seed=1,2") == []
    assert problems("-m", "ppo.clip=0.2,2", "ppo.seed=1,x", "ppo.updats=1,2") == [
        UNKNOWN,
        "ppo.seed must be a whole number or null; found x; write for example null (the default)",
        "ppo.clip must be in (0, 1); found 2.0; write for example 0.2 (the default) (in member 1: ppo.clip=2)",
    ]
    assert problems("-m", "ppo.updates=range(1,4)", "ppo.gold_rollouts=65") == [
        "ppo.gold_rollouts must be at most ppo.rollouts_per_update (64); found 65; write 64 or less "
        "(in member 0: ppo.updates=1 ppo.gold_rollouts=65)"
    ]


@pytest.mark.parametrize(
    ("words", "sorted_words"),
    [
        ("stage=ppo -m ppo.seed=1,2 name=x", "-m stage=ppo ppo.seed=1,2 name=x"),
        ("a=1 --cfg job ~data --resolve +b=2", "--cfg job --resolve a=1 ~data +b=2"),
        ("a=1 --config-dir x=y b=2 -cn name c=3", "--config-dir x=y -cn name a=1 b=2 c=3"),
        ("a=1 --config-dir=x b=2", "--config-dir=x a=1 b=2"),
        ("--info a=1 -p model", "--info -p model a=1"),
        ("a=1 --info defaults b=2", "--info defaults a=1 b=2"),
        ("a=1 --info", "--info all a=1"),
        ("a=-1 b=~c", "a=-1 b=~c"),
        ("misspelt -m a=1", "misspelt -m a=1"),
        ("", ""),
    ],
)
def test_flags_come_first_wherever_they_are_written(words: str, sorted_words: str) -> None:
    assert flags_first(words.split()) == sorted_words.split()


def test_every_flag_of_hydra_that_takes_a_value_is_known() -> None:
    takes = [a for a in get_args_parser()._actions if a.nargs is None and a.option_strings]
    assert {word for action in takes for word in action.option_strings} == set(TAKE_VALUE)


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["-m"]])
def test_overrides_on_both_sides_of_a_flag_reach_hydra(flag: list[str], tmp_path: Path) -> None:
    words = ["cache_dir=c", *flag, "seed=7", f"hydra.sweep.dir={tmp_path}", "ppo.clip=3"]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=CONF.parent, capture_output=True, text=True)
    if flag == ["-m"]:
        assert done.returncode == 2
        assert "ppo.clip must be in (0, 1); found 3.0" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert ("seed: 7" in done.stdout, "cache_dir: c" in done.stdout) == (True, True)


def test_run_dir_is_no_directory_for_many() -> None:
    assert problems("-m", "run_dir=runs/x", "ppo.seed=1,2") == [
        "run_dir names one run; write hydra.sweep.dir=DIRECTORY for the directory of a sweep"
    ]


def test_what_a_sampler_will_draw_is_not_guessed() -> None:
    words = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize"]
    assert problems(*words, "ppo.kl.coef=interval(0.01,0.1)", "hydra.sweeper.n_trials=3") == []
    [text] = problems("-m", "hydra/sweeper=optuna", "ppo.kl.coef=interval(0.01,0.1)")
    assert "hydra.sweeper.direction must be maximize" in text
    [text] = problems(*words, "ppo.kl.coeff=interval(0.01,0.1)")
    assert text.startswith("ppo.kl.coeff is not a key of the configuration; write ppo.kl.coef")


@pytest.mark.parametrize(
    ("word", "whole"),
    [
        ("model.lora={rank:8}", "model={lora:{rank:8}}"),
        ("model.lora.rank=8", "model={lora:{rank:8}}"),
        ("model.lora.targets=[q_proj,v_proj]", "model={lora:{targets:[q_proj,v_proj]}}"),
        ("model.lora.rank=8,16", "model={lora:{rank:8}},{lora:{rank:16}}"),
        ("model.lora=null,{rank:8}", "model={lora:null},{lora:{rank:8}}"),
        ("model.lora={rank:8},null", "model={lora:{rank:8}},{lora:null}"),
        ("model.lora_by_role.policy.rank=8", "model.lora_by_role={policy:{rank:8}}"),
        ("data.gold={path:x}", "data={gold:{path:x}}"),
        ("model.lora=null", "model.lora=null"),
        ("model.lora=3", "model.lora=3"),
        ("sft.epochs=3", "sft.epochs=3"),
        ("+experiment=grpo", "+experiment=grpo"),
    ],
)
def test_a_section_that_may_be_null_is_set_from_the_one_around_it(word: str, whole: str) -> None:
    assert whole_sections([word]) == [whole]


def test_adapters_are_switched_on_by_a_word() -> None:
    assert command_line_problems(["model.lora={rank:8}"], CONF) == []
    of_roles = [
        f"model.lora_by_role.{part}" for part in ("value_model.rank=8", "value_model.alpha=9", "reward_model={rank: 8}")
    ]
    _, one = command_line_problems(["model.lora={rank:16}", *of_roles, "misspelt=1"], CONF)
    assert one.startswith(
        "model.lora_by_role.value_model.alpha must be 32.0, as of the reward model (model.lora.alpha)"
    )
    _, problem = command_line_problems(["model.lora.rank=0", "misspelt=1"], CONF)
    assert "model.lora.rank must be at least 1; found 0" in problem
    [problem] = command_line_problems(["model.lora={rnk:8}"], CONF)
    assert "rnk" in problem


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        (
            ["model.lora.rank=64", "model.lora.alpha=128", "ppo.seed=1,2"],
            ["model={lora:{rank:64,alpha:128}}", "ppo.seed=1,2"],
        ),
        (["model.lora={rank:8}", "sft.epochs=2", "model.lora.rank=4"], ["model={lora:{rank:4}}", "sft.epochs=2"]),
        (
            ["model.lora.rank=8,16", "model.lora.alpha=64,32"],
            [
                "model={lora:{rank:8,alpha:64}},{lora:{rank:8,alpha:32}},{lora:{rank:16,alpha:64}},{lora:{rank:16,alpha:32}}"
            ],
        ),
        (["data=files", "data.gold.path=g.jsonl"], ["data=files", "++data={gold:{path:g.jsonl}}"]),
        (
            ["data.gold.path='a b.jsonl'", "data.gold.max_rows=3", "data.gold.format=null"],
            ["data={gold:{path:'a b.jsonl',max_rows:3,format:null}}"],
        ),
    ],
)
def test_overrides_of_one_section_are_one(words: list[str], whole: list[str]) -> None:
    """Hydra's sweepers keep the last override of a key."""
    assert whole_sections(words) == whole


def test_every_override_of_a_section_reaches_every_member() -> None:
    words = ["data=vader", "data.gold.max_rows=3", "model.lora.rank=8,16", "model.lora.alpha=64", "ppo.seed=1,2"]
    parsed = OverridesParser.create().parse_overrides(whole_sections(words))
    [batch] = BasicSweeper.split_arguments(parsed, None)
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        members = [to_config(compose("config", member)) for member in batch]
    found = [(m.model.lora.rank, m.model.lora.alpha, m.ppo.seed, m.data.gold.max_rows) for m in members]  # type: ignore[union-attr]
    assert found == [(8, 64, 1, 3), (8, 64, 2, 3), (16, 64, 1, 3), (16, 64, 2, 3)]


def test_a_glob_over_a_group_is_left_to_hydra() -> None:
    assert problems("-m", "+experiment=glob(*)") == []


@pytest.mark.parametrize("said", [("--config-dir", "DIR"), ("--config-dir=DIR",), ("hydra.searchpath=[file://DIR]",)])
def test_a_sweep_over_experiments_of_ones_own(said: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nppo: {updates: 0}\n")
    words = [word.replace("DIR", str(tmp_path)) for word in said]
    [text] = command_line_problems(["-m", *words, "+experiment=mine", "ppo.seed=1,2"], CONF)
    assert text.startswith("ppo.updates must be at least 1; found 0")


OWN = (CONF / "config.yaml").read_text().replace("ppo:\n", "ppo:\n  estimator: grpo\n  samples_per_prompt: 7\n")


@pytest.mark.parametrize(
    "said",
    [("--config-dir", "DIR", "-cn", "own"), ("--config-dir=DIR", "--config-name=own"), ("-cp", "DIR", "-cn", "own")],
)
def test_a_sweep_over_a_configuration_of_ones_own(said: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    words = [word.replace("DIR", str(tmp_path)) for word in said]
    if "-cp" in words:
        shutil.copytree(CONF, tmp_path, dirs_exist_ok=True)
    [text] = command_line_problems(["-m", *words, "ppo.seed=1,2"], CONF)
    assert text.startswith("ppo.rollouts_per_update must be a multiple of ppo.samples_per_prompt (7); found 64")
    assert command_line_problems(["-m", *words, "ppo.seed=1,2", "ppo.samples_per_prompt=8"], CONF) == []


def test_a_folder_of_configuration_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert problems("--config-dir", f"{tmp_path}/no") == [f"--config-dir must be a directory; found {tmp_path}/no"]


def starting(*arguments: str) -> list[str]:
    return command_line_problems(list(arguments), CONF, starts=True)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("data.sft.path=${oc.env:NOPE}", 'data.sft.path: KeyError raised while resolving interpolation: "Environment'),
        ("model.path=${nope}/x", "model.path: Interpolation key 'nope' not found"),
        ("run_dir=${oc.env:NOPE}/x", 'run_dir: KeyError raised while resolving interpolation: "Environment'),
        (
            "cluster=nope",
            "In 'config': Could not find 'cluster/nope'; write one of laptop, multi_node, single_node_8gpu",
        ),
        (
            "run_dir=",
            "run_dir must be a directory that is there or can be made; found nothing; write for example run_dir=",
        ),
        (
            "run_dir=FILE",
            "run_dir must be a directory that is there or can be made; found FILE, and FILE is no directory",
        ),
        (
            "run_dir=FILE/x",
            "run_dir must be a directory that is there or can be made; found FILE/x, and FILE is no dir",
        ),
        ("hydra.run.dir=FILE", "hydra.run.dir must be a directory that is there or can be made; found FILE, and FILE"),
    ],
)
def test_what_hydra_cannot_begin_is_said_before_it(word: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    [found] = starting(word.replace("FILE", str(file)))
    assert found.startswith(text.replace("FILE", str(file)))
    assert problems(word.replace("FILE", str(file))) == []  # of a job that runs elsewhere
    assert starting("--cfg", "job", word.replace("FILE", str(file))) == []


def test_the_directory_of_a_sweep_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("", f"{tmp_path}/link"):
        [text] = starting("-m", "ppo.seed=1,2", f"hydra.sweep.dir={place}")
        assert text.startswith("hydra.sweep.dir must be a directory that is there or can be made; found ")
    assert starting("-m", "ppo.seed=1,2", f"hydra.sweep.dir={tmp_path}/a/b") == []
    assert starting(f"run_dir={tmp_path}/" + "${hydra:job.name}", "~data") == []
    assert list(tmp_path.iterdir()) == [tmp_path / "link"]


def test_a_sweeper_draws_in_no_section_that_is_null() -> None:
    words = ["-m", "+experiment=sweep_optuna"]
    [text] = starting(*words, "model.lora.alpha=interval(8,16)")
    assert text.startswith("model.lora is null, where a sweeper draws model.lora.alpha; write it in an experiment")
    assert starting(*words, "model.lora.alpha=choice(8,16)") == []
    assert starting("-m", "+experiment=[sweep_optuna,lora]", "model.lora.alpha=interval(8,16)") == []


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        (["++model.lora.rank=8"], ["model={lora:{rank:8}}"]),
        (["+model.lora={rank: 8}"], ["model={lora:{rank:8}}"]),
        (["++model.lora.rank=8,16"], ["model={lora:{rank:8}},{lora:{rank:16}}"]),
        (["data.gold.path="], ["data={gold:{path:''}}"]),
        (
            ["+data.prompt_sources.a.path=x", "+data.prompt_sources.b={path: y}", "+data.prompt_sources.a.weight=0.5"],
            ["++data.prompt_sources={a:{path:x,weight:0.5},b:{path:y}}"],
        ),
        (["data.prompt_sources.a.path=x"], ["data.prompt_sources.a.path=x"]),
    ],
)
def test_sections_that_are_added_are_whole(words: list[str], whole: list[str]) -> None:
    found = whole_sections(words)
    parsed = [OverridesParser.create().parse_override(word) for word in (*found, *whole)]
    assert [(o.key_or_group, o.type, o._value) for o in parsed[: len(found)]] == [
        (o.key_or_group, o.type, o._value) for o in parsed[len(found) :]
    ]


def test_a_scorer_and_a_source_are_added_by_dotted_words() -> None:
    words = ["+reward_service.scorers.proxy.kind=function", "+reward_service.scorers.proxy.function=rules.py:f"]
    words += ["+data.prompt_sources.a.path=x", "++model.lora.rank=8", "data.gold.path="]
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = to_config(compose("config", whole_sections(words)))
    scorer = config.reward_service.scorers["proxy"]
    assert (scorer.kind, scorer.function) == ("function", "rules.py:f")
    assert (config.data.prompt_sources["a"].path, config.model.lora.rank) == ("x", 8)  # type: ignore[union-attr]
    assert config.data.gold.path == ""  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("ppo={kl: {coef: x}}", "ppo.kl.coef must be a number; found x; write for example 0.05 (the default)"),
        ("ppo={kl: {coof: 1}}", "ppo.kl.coof is not a key of the configuration; write ppo.kl.coef"),
        (
            "+reward_service.scorers={proxy: {kind: function, timeout_s: 5s}}",
            "+reward_service.scorers.proxy.timeout_s must be a number; found 5s; write for example 5.0 (the default)",
        ),
        (
            "+reward_service.scorers.r.timeout_s=5s",
            "+reward_service.scorers.r.timeout_s must be a number; found 5s; write for example 5.0 (the default)",
        ),
        ("+data.prompt_sources.a=3", "+data.prompt_sources.a must be a section with keys of its own; found 3"),
        (
            "model={revision: 1.10}",
            "model.revision must be a text; found one that is read as 1.1; write it in quotes within {revision: 1.10}",
        ),
        (
            "+data.prompt_sources.a.path=1.10",
            "+data.prompt_sources.a.path must be a text; found 1.10, which is read as 1.1; write "
            "+data.prompt_sources.a.path='\"1.10\"'",
        ),
        (
            "ppo.mask_truncated=2",
            "ppo.mask_truncated must be true or false; found 2; write for example False (the default)",
        ),
        ("name=müller", "name: token recognition error at: 'ü'; write name='\"müller\"'"),
    ],
)
def test_the_key_that_is_wrong_is_named(word: str, text: str) -> None:
    assert text in problems(word)


def test_a_sweep_has_no_run_directory_however_it_is_written() -> None:
    assert problems("-m", "++run_dir=runs/x", "ppo.seed=1,2") == [
        "run_dir names one run; write hydra.sweep.dir=DIRECTORY for the directory of a sweep"
    ]


def test_the_command_of_a_run_says_where_its_configuration_lay(tmp_path: Path) -> None:
    """`train.py` keeps it beside Hydra's record of the overrides, for reports."""
    folder, run_dir = tmp_path / "josé", tmp_path / "run"
    folder.mkdir()
    (folder / "own.yaml").write_text(OWN)
    words = ["--config-dir", str(folder), "-cn", "own", "ppo.clip=7", f"run_dir={run_dir}"]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=CONF.parent, capture_output=True, text=True)
    assert (done.returncode, "ppo.samples_per_prompt (7)" in done.stderr) == (2, True)
    run, flags = read(run_dir), ["--config-name=own", f"--config-dir={folder}"]
    assert run.command == ["python", "train.py", *flags, "ppo.clip=7", f"run_dir={run_dir}"]
    assert Member(run, "failed").command == run.command
    plain = subprocess.run([sys.executable, "train.py", *words[4:]], cwd=CONF.parent, capture_output=True, text=True)
    assert (plain.returncode, read(run_dir).origin) == (2, [])
