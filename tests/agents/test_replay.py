"""Steps that are taken again from what a run left on disk, and its episodes under another reward."""

import gzip
import json
import re
import shutil

import pytest

from agents import replay
from agents.core import replaying
from agents.core.policy import Policy
from agents.core.records import read_rollout, rollout_path
from agents.dapo import DAPO
from agents.grpo import GRPO, GRPOConfig
from agents.ppo import PPO
from agents.raft import RAFT
from agents.sft import SFT
from rewards import Normalised, Reward, Score, register
from tests.agents.conftest import make_model
from textenv import make_task
from textenv.cli import main

COPY, LENGTH = "textenv/ProbeDelayedCopy-v0", "textenv/ProbeLength-v0"


class Spread(Reward):
    """Pays for the length, each token its share."""

    name = "spread"

    def __call__(self, samples):
        return [Score(0.1 * len(s.tokens), tokens=(0.1,) * len(s.tokens)) for s in samples]


register("replay_spread", Spread())
register("replay_normalised", Normalised("exact", center=False))

RUNS = {
    "grpo": (GRPO, {"updates_per_batch": 2, "kl_reward_coef": 0.1, "kl_target": 1e-3}),
    "grpo, lora": (GRPO, {"lora_rank": 2, "kl_loss_coef": 0.1}),
    "grpo, normalised": (GRPO, {"reward": "replay_normalised", "scale_rewards": "none"}),
    "dapo": (DAPO, {"total_episodes": 160, "kl_reward_coef": 0.1}),
    "raft": (RAFT, {"variant": "raft++", "updates_per_batch": 2}),
    "ppo": (PPO, {"critic": "separate", "kl_reward_coef": 0.1, "reward": "replay_spread"}),
    "ppo, lora": (PPO, {"critic": "lora", "lora_rank": 2, "kl_step_target": 1e-2}),
}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def trained(fresh_model, config):
    """Trains for a few steps, each of which leaves a checkpoint; gives the folder of the run."""

    def train(agent_class, callback=None, **changes):
        options = {"env_options": {"delay": "0"}, "eval_episodes": 2, "checkpoint_every": 1, **changes}
        settings = config(fresh_model(COPY, delay=0), agent_class, **options)
        return agent_class(COPY, settings).learn(callback=callback).last_training.run.folder

    return train


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Three steps of GRPO, with spread in every group; checkpoints of the last two."""
    folder = tmp_path_factory.mktemp("kept")
    tokenizer = make_task(LENGTH).tokenizer()
    Policy(make_model("llama", vocab_size=tokenizer.vocab_size), tokenizer).save(folder / "model")
    sizes = {"prompts_per_step": 4, "group_size": 4, "total_episodes": 48, "eval_episodes": 2, "checkpoint_every": 1}
    config = GRPOConfig(model=str(folder / "model"), run_dir=str(folder / "run"), learning_rate=1e-2, **sizes)
    GRPO(LENGTH, config).learn()
    return folder / "run"


@pytest.fixture
def folder(kept, tmp_path):
    """A copy of that run, to be changed."""
    return shutil.copytree(kept, tmp_path / "copy")


@pytest.fixture
def command(capsys):
    """Runs `textenv replay`; gives its exit status, and what it printed on stdout and on stderr."""

    def run(folder, *arguments):
        capsys.readouterr()
        try:
            main(["replay", str(folder), *map(str, arguments)])
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def content(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def write_rollout(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def change_rollout(folder, step, change):
    rows = read_rollout(rollout_path(folder, step))
    for row in rows:
        change(row)
    write_rollout(rollout_path(folder, step), rows)


def change_metric(folder, step, name, value):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[step - 1][name] = value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def steps_in(folder):
    return len(list((folder / "rollouts").iterdir()))


# --- A step again ---


@pytest.mark.parametrize("name", RUNS)
def test_the_last_step_comes_out_bit_for_bit_and_the_run_is_only_read(trained, name):
    agent_class, changes = RUNS[name]
    folder = trained(agent_class, **changes)
    step, before = steps_in(folder), content(folder)
    [taken] = replay.replayed(folder, replay.read_config(folder), step, sample_again=True)
    assert content(folder) == before
    assert taken.step == step
    figures = {figure.name: figure for figure in taken.figures}
    assert {"loss", "advantage of tokens", "entropy", "logp_gap", "grad_norm", "return", "episodes"} <= figures.keys()
    assert {name: figure.difference for name, figure in figures.items()} == dict.fromkeys(figures, 0.0)
    assert figures["grad_norm"].now > 0
    rows = len(read_rollout(rollout_path(folder, step)))
    assert taken.sampled == replaying.Sampled(rows, rows, rows, rows)


@pytest.mark.parametrize("name", ["grpo, normalised", "dapo", "ppo"])
def test_without_a_checkpoint_the_steps_from_the_start_are_taken_on_the_way(trained, command, name):
    agent_class, changes = RUNS[name]
    folder = trained(agent_class, **changes)
    shutil.rmtree(folder / "checkpoints")
    status, out, _ = command(folder, "--step", 3, "--sample-again")
    assert status == 0
    assert f"taking step 3 of {folder} again, from the start, 2 steps on the way\n" in out
    taken = replay.replayed(folder, replay.read_config(folder), 3)
    assert [one.step for one in taken] == [1, 2, 3]
    assert not any(figure.difference for one in taken for figure in one.figures)


def test_dapo_refills_are_given_out_in_their_order(trained):
    folder = trained(DAPO, total_episodes=160)
    rows = read_rollout(rollout_path(folder, 1))
    assert len(rows) > 4 * 4
    [taken] = replay.replayed(folder, replay.read_config(folder), 1)
    assert {"kept_share", "surplus"} <= {figure.name for figure in taken.figures}
    assert not taken.differing


def test_the_learning_rate_falls_as_it_did_when_fewer_episodes_were_asked_for(fresh_model, config):
    settings = config(fresh_model(LENGTH), GRPO, updates_per_batch=2, eval_episodes=2)
    folder = GRPO(LENGTH, settings).learn(total_episodes=32).last_training.run.folder
    taken = replay.replayed(folder, replay.read_config(folder), 2)
    assert not any(figure.difference for one in taken for figure in one.figures)


def test_the_engine_of_the_run_is_needed_only_to_sample_again(folder, command):
    described = json.loads((folder / "config.json").read_text())
    described["settings"]["engine"] = "native max_rows none"
    (folder / "config.json").write_text(json.dumps(described))
    assert command(folder, "--step", 3)[0] == 0
    status, _, err = command(folder, "--step", 3, "--sample-again")
    assert status == 2
    assert "max_rows" in err


def test_what_is_shown_stands_beside_what_was_logged(folder, command):
    status, out, _ = command(folder, "--step", 2)
    assert status == 0
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if "│" in line]
    assert [row[0] for row in rows[:5]] == ["loss", "advantage of tokens", "entropy", "logp_gap", "grad_norm"]
    logged = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
    for name, then, now, difference in rows:
        assert (then, difference) == (now, "none")
        assert name.endswith(" of tokens") or then == f"{logged[name]:.6g}"
    assert f"all {len(rows)} figures are as logged, but for rounding" in out


def test_a_run_that_is_training_can_be_replayed(trained, command):
    seen = []

    def look(training):
        if training.step == 2:
            for written in training.run._under_way:
                written.result()
            before = content(training.run.folder)
            seen.append(command(training.run.folder, "--step", 2)[0])
            assert content(training.run.folder) == before

    trained(GRPO, look)
    assert seen == [0]


# --- Differences ---


def test_a_changed_score_changes_advantages_and_gradient_and_ends_with_status_1(folder, command):
    change_rollout(folder, 3, lambda row: row.update({"value": row["return"] ** 2, "return": row["return"] ** 2}))
    [taken] = replay.replayed(folder, replay.read_config(folder), 3)
    assert {"advantage of tokens", "grad_norm", "reward", "return"} <= set(taken.differing)
    assert {"entropy", "logp_gap", "new_tokens_mean", "episodes"}.isdisjoint(taken.differing)
    status, out, _ = command(folder, "--step", 3)
    assert status == 1
    assert "figures differ by more than rounding: advantage of tokens, grad_norm, reward" in out


def test_a_step_that_no_longer_teaches_anything_differs_in_what_it_has_not(folder):
    change_rollout(folder, 3, lambda row: row.update({"value": 1.0, "return": 1.0}))
    [taken] = replay.replayed(folder, replay.read_config(folder), 3)
    assert {"loss", "entropy", "grad_norm"} <= set(taken.differing)


def test_a_changed_log_probability_shows_in_the_gap_and_in_what_corrects_for_it(folder):
    change_rollout(folder, 2, lambda row: row.update(logp=[logp - 0.5 if logp else logp for logp in row["logp"]]))
    [*_, taken] = replay.replayed(folder, replay.read_config(folder), 2)
    corrected = {"loss", "grad_norm", "tis_mean"}
    assert set(taken.differing) - corrected == {"logp_gap", "logp_gap_max", "ratio of tokens"}
    assert "tis_mean" in taken.differing
    [gap] = [figure for figure in taken.figures if figure.name == "logp_gap"]
    assert gap.now == pytest.approx(0.5, abs=1e-3)  # beyond max_logp_gap, which would stop a training


def test_completions_that_do_not_come_out_again_end_with_status_1_though_all_figures_do(folder, command):
    described = json.loads((folder / "config.json").read_text())
    described["settings"]["seed"] += 1
    (folder / "config.json").write_text(json.dumps(described))
    assert command(folder, "--step", 3)[0] == 0
    status, out, _ = command(folder, "--step", 3, "--sample-again")
    assert status == 1
    assert "figures are as logged, but for rounding" in out
    [same] = re.findall(r"sampled again, (\d+) of 16 completions come out as stored", out)
    assert int(same) < 16


def test_the_first_step_to_differ_is_named(folder, command):
    shutil.rmtree(folder / "checkpoints")
    change_metric(folder, 2, "loss", 5.0)
    status, out, _ = command(folder, "--step", 3)
    assert status == 1
    assert "step 2, on the way, differs already: loss\n" in out
    assert "figures are as logged, but for rounding" in out


def test_what_was_no_number_and_is_none_is_the_same_and_what_is_one_now_differs():
    nan = float("nan")
    assert not replaying.compared("", [nan], [nan]).differs
    assert replaying.compared("", [nan], [nan]).difference == 0
    assert replaying.compared("", [nan], [1.0]).differs
    assert replaying.compared("", [1.0], [nan]).differs


def test_rounding_is_in_parts_of_a_figure_or_on_the_whole():
    assert not replaying.compared("", [100.0], [100.05]).differs
    assert replaying.compared("", [100.0], [100.2]).differs
    assert not replaying.compared("", [0.0], [5e-6]).differs
    assert replaying.compared("", [0.0], [2e-5]).differs
    one = replaying.compared("", [1.0, -3.0], [1.0, -2.5])
    assert (one.logged, one.now, one.difference, one.differs) == (2.0, 1.75, 0.5, True)


# --- Runs of earlier versions ---


def test_rows_without_the_score_are_replayed_where_nothing_was_taken_off_the_return(folder, command):
    change_rollout(folder, 2, lambda row: row.pop("value", None))
    assert command(folder, "--step", 2)[0] == 0
    assert command(folder, "--rescore", "regex", "--options", "pattern", ".*", "--step", 2)[0] == 0


@pytest.mark.parametrize(("agent_class", "changes"), [(DAPO, {}), (PPO, {"kl_reward_coef": 0.1})], ids=["dapo", "ppo"])
def test_and_are_refused_where_a_penalty_was(trained, command, agent_class, changes):
    folder = trained(agent_class, **changes)
    change_rollout(folder, 1, lambda row: row.pop("value", None))
    for arguments in (["--step", 1], ["--step", 1, "--rescore", "exact"]):
        status, _, err = command(folder, *arguments)
        assert status == 2
        assert "of an earlier version, which kept the return of an episode but not its score" in err


# --- What cannot be replayed ---


def test_a_folder_without_a_run_a_step_that_is_not_there_and_missing_arguments_are_named(folder, command, tmp_path):
    for arguments, message in [
        ([tmp_path, "--step", 1], f"no run in {tmp_path}; give the folder that a run printed as its own"),
        ([tmp_path / "none", "--step", 1], "no run in "),
        ([folder, "--step", 9], f"the run in {folder} has no step 9; it has 1 to 3"),
        ([folder, "--rescore", "exact", "--step", 0], "has no step 0; it has 1 to 3"),
        ([folder], "give the --step to take again, or --rescore REWARD"),
        ([folder, "--step", 1, "--out", "x.jsonl"], "--options and --out go with --rescore"),
        ([folder, "--rescore", "exact", "--sample-again"], "--sample-again goes with a step"),
        ([folder, "--rescore", "exakt"], "did you mean"),
        ([folder, "--rescore", "exact", "--options", "loud", "1"], "cannot be made with the options"),
        ([folder, "--rescore", "exact", "--out", folder / "x.jsonl"], "--out must be a file in a folder that exists"),
        ([folder, "--rescore", "exact", "--out", tmp_path / "no" / "x"], "--out must be a file in a folder that exi"),
    ]:
        status, _, err = command(*arguments)
        assert (status, message in err) == (2, True), err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "000002.jsonl.gz is not a whole gzip file"),
        (lambda path: path.write_bytes(gzip.compress(b"{}\n{")), "000002.jsonl.gz, row 1: no episode of a run"),
        (lambda path: path.write_bytes(gzip.compress(b"{")), "000002.jsonl.gz, row 1: not JSON"),
        (lambda path: path.write_bytes(gzip.compress(b"")), "000002.jsonl.gz holds no episode"),
        (lambda path: write_rollout(path, read_rollout(path)[:-4]), "step 2 asks for more episodes than the 12"),
        (lambda path: write_rollout(path, read_rollout(path) * 2), "step 2 asks for fewer episodes than the 32"),
    ],
    ids=["cut", "not rows", "not JSON", "empty", "too few", "too many"],
)
def test_a_damaged_rollout_is_named(folder, command, damage, message):
    damage(rollout_path(folder, 2))
    status, _, err = command(folder, "--step", 2)
    assert status == 2
    assert message in err


def test_a_step_on_the_way_that_is_missing_is_named(folder, command):
    shutil.rmtree(folder / "checkpoints")
    rollout_path(folder, 2).unlink()
    status, _, err = command(folder, "--step", 3)
    assert status == 2
    assert "step 3 is to be taken from the start on, but the run has not kept step 2" in err


def test_a_damaged_checkpoint_is_left_aside(folder, command):
    weights = folder / "checkpoints" / "000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    status, out, _ = command(folder, "--step", 3)
    assert status == 0
    assert "000002 is damaged and left aside: model.safetensors is not as it was kept" in out
    assert f"taking step 3 of {folder} again, from the start, 2 steps on the way" in out


def test_a_checkpoint_that_a_training_drops_meanwhile_is_named(folder, command, monkeypatch):

    def load(_, checkpoint):
        shutil.rmtree(checkpoint.resolve())
        raise FileNotFoundError("no weights")

    monkeypatch.setattr(replaying.PolicyGradient, "_load_policy", load)
    status, _, err = command(folder, "--step", 3)
    assert status == 2
    assert f"the training at work in {folder} has dropped {folder}/checkpoints/000002 meanwhile; replay again" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema": 99},
            "was written with schema 99, this version reads 1; take the version that wrote it, textenv 0.",
        ),
        ({"agent": "sfft"}, "no agent 'sfft'; did you mean sft?"),
        ({"imports": ["no_such_module"]}, "no module 'no_such_module'"),
    ],
    ids=["schema", "agent", "imports"],
)
def test_a_run_of_another_world_is_refused(folder, command, change, message):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | change))
    status, _, err = command(folder, "--step", 1)
    assert status == 2
    assert message in err


def test_settings_that_this_version_has_not_and_a_damaged_config_are_named(folder, command):
    described = json.loads((folder / "config.json").read_text())
    described["settings"]["colour"] = "blue"
    (folder / "config.json").write_text(json.dumps(described))
    assert "the settings of the run are not those of this version: " in command(folder, "--step", 1)[2]
    (folder / "config.json").write_text("{")
    assert "config.json is damaged" in command(folder, "--step", 1)[2]


def test_a_step_beyond_the_end_of_the_run_is_named(folder, command):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"total_episodes": 32}))
    assert "taken again, the run is over with step 2, before step 3" in command(folder, "--step", 3)[2]


@pytest.mark.parametrize(
    ("agent_class", "changes", "message"),
    [
        (GRPO, {"staleness": 1}, "a run with staleness 1 cannot be replayed"),
        (SFT, {}, "an agent that samples can be replayed (dapo, grpo, ppo, raft), not 'sft'"),
    ],
    ids=["staleness", "sft"],
)
def test_what_is_not_sampled_from_its_checkpoint_is_refused(trained, command, agent_class, changes, message):
    status, _, err = command(trained(agent_class, **changes), "--step", 1)
    assert status == 2
    assert message in err


# --- Another reward ---


def episode(completion, reference, **score):
    kept = {"value": 1.0, "return": 1.0, "parts": {}, "error": None, "verdict": {}, **score}
    tokens = {"tokens": [5, 6, 7], "source": [1, 2, 2], "logp": [0.0, -0.5, -0.5], "reward": [0.0, 0.0, 1.0]}
    texts = {"prompt": "6*7=", "completions": [completion], "reference": reference, "finish": "eos"}
    return {"group": 0, **texts, **kept, **tokens}


WRONG = {"value": 0.0, "return": 0.0}
BROKEN = {"value": None, "return": None, "error": "time-out"}


@pytest.fixture
def by_hand(tmp_path):
    """A run of two steps with five episodes that were scored by hand."""
    folder = tmp_path / "by-hand"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"schema": 1, "agent": "grpo", "imports": [], "settings": {}}))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    rows = [
        episode("42", "42"),
        episode("[bold]\x1b[31m<b>41</b>\n", "42"),  # right as it was scored, wrong by the rule "exact"
        episode("x" * 500, "x" * 500, **WRONG),
        episode("42", "42", **BROKEN),
    ]
    write_rollout(rollout_path(folder, 1), rows)
    write_rollout(rollout_path(folder, 2), [episode("no", "42", value=0.2, parts={"style": 0.2}, **{"return": 0.2})])
    return folder


def table_rows(out):
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if "│" in line]


def test_rescoring_counts_verdicts_before_and_after(by_hand, command):
    before = content(by_hand)
    status, out, _ = command(by_hand, "--rescore", "exact")
    assert status == 0
    assert content(by_hand) == before
    rows = table_rows(out)
    # Worked by hand: before the graded four have 1, 1, 0 and 0.2; after the five have 1, 0, 1, 1 and 0.
    assert rows[:5] == [
        ["mean reward", "0.55", "0.6"],
        ["right", "2", "3"],
        ["wrong", "1", "2"],
        ["no verdict", "1", "0"],
        ["ungraded", "1", "0"],
    ]
    shares = {row[0]: row[1] for row in rows[5:10]}
    one = "1: 20.0% [3.6, 62.4] of 5"
    assert shares == {
        "right → wrong": one,
        "wrong → right": one,
        "ungraded → right": one,
        "no verdict → wrong": one,
        "any change": "4: 80.0% [37.6, 96.4] of 5",
    }


def test_one_step_alone_is_rescored_and_its_options_are_those_of_the_reward(by_hand, command):
    _, out, _ = command(by_hand, "--rescore", "regex", "--step", 1, "--options", "pattern", "(?s).*4.*")
    assert f"4 episodes of {by_hand} under the reward 'regex'\n" in out
    assert ["right → wrong", "0: 0.0% [0.0, 49.0] of 4"] in table_rows(out)


def test_what_a_model_wrote_is_shown_as_text_on_one_line_and_cut(by_hand, command):
    _, out, _ = command(by_hand, "--rescore", "exact")
    assert "\x1b" not in out
    joined = "".join(row[2] for row in table_rows(out)[10:])
    assert r"[bold]\u001b[31m<b>41</b>\n" in joined
    assert joined.count("x") == replay.LONGEST_CELL - 1


def test_changed_episodes_are_written_as_json_lines(by_hand, command, tmp_path):
    out = tmp_path / "changed.jsonl"
    assert command(by_hand, "--rescore", "exact", "--out", out)[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 1, 2]
    assert [row["score"]["value"] for row in rows] == [0.0, 1.0, 1.0, 0.0]
    assert [row["value"] for row in rows] == [1.0, 0.0, None, 0.2]
    main(["score", "--file", str(out), "--reward", "exact"])  # they are samples as any


def test_a_reward_that_grades_nothing_is_an_error(by_hand, command):
    def fails(prompt, completion, reference):
        raise ValueError("no such answer")

    register("replay_fails", fails)
    status, out, err = command(by_hand, "--rescore", "replay_fails")
    assert status == 2
    assert ["ungraded", "1", "5"] in table_rows(out)
    assert "could grade none of them" in err
    assert "no such answer" in err


def test_a_damaged_rollout_is_named_by_rescoring_too(by_hand, command):
    rollout_path(by_hand, 2).write_bytes(b"\x1f\x8b")
    status, _, err = command(by_hand, "--rescore", "exact")
    assert status == 2
    assert "000002.jsonl.gz is not a whole gzip file" in err
    assert command(by_hand, "--rescore", "exact", "--step", 1)[0] == 0


# --- Reading ---


def test_a_rollout_is_read_as_it_was_written_by_json_and_by_pandas(folder):
    pandas = pytest.importorskip("pandas")
    path = rollout_path(folder, 2)
    rows = read_rollout(path)
    assert len(rows) == 16
    frame = pandas.read_json(path, lines=True, precise_float=True)
    assert set(frame.columns) == set().union(*rows)
    assert frame["tokens"].tolist() == [row["tokens"] for row in rows]
    assert frame["return"].tolist() == [row["return"] for row in rows]
