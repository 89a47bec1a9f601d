"""What others wrote (models, data sets, completions, servers) neither runs, nor acts on a terminal, nor learns a key."""

from __future__ import annotations

import ast
import gzip
import json
from contextlib import nullcontext
from pathlib import Path

import gymnasium
import pytest
from rich.console import Console
from transformers import LlamaConfig, LlamaForSequenceClassification

from agents.core import progress
from agents.core.models import load_model
from agents.core.policy import Policy
from agents.core.progress import LiveLine
from agents.grpo import GRPO
from agents.ppo import PPO
from rewards.judge.template import Prompt
from rewards.registry import _targets as registered_rewards
from tests.agents.conftest import make_model
from tests.pickles import KINDS, pickle_weights
from tests.rewards.judge.server import Fault, Server
from textenv import registry
from textenv.cli import _fail, main
from textenv.datasets import Template
from textenv.envs import make_env
from textenv.registry import register
from textenv.task import Problem, Task
from textenv.tokenizer import CharTokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]
ENV = "textenv/ProbeOneHot-v0"
HOSTILE = (
    "{0.__class__}%s%n$(touch run)`touch run`\x1b]0;owned\x07\x1b[31m\x9b2J\r\u202e[red]<script>alert(1)</script>[/red]"
)
QUICK = "--total-episodes 16 --prompts-per-step 4 --group-size 4 --eval-episodes 4 --run-dir trained"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTENV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments: str) -> str:
    """The sentence with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == 2
    return capsys.readouterr().err


# Pickles.


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_of_pickles_is_refused_unread(fresh_model, kind):
    folder = Path(fresh_model(ENV))
    mark = pickle_weights(folder, kind)
    with pytest.raises(
        ValueError, match=r"no causal language model at .*: its weights are (in \S+, a pickle|not .safete)"
    ):
        load_model(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "arguments",
    [("train", "grpo", ENV, *QUICK.split()), ("evaluate", ENV, "--episodes", "4"), ("generate", ENV)],
    ids=lambda arguments: arguments[0],
)
def test_commands_refuse_a_model_of_pickles_in_a_sentence(fresh_model, capsys, arguments):
    folder = Path(fresh_model(ENV))
    mark = pickle_weights(folder)
    error = refused(capsys, *arguments, "--model", folder)
    assert "its weights are in pytorch_model.bin, a pickle, which could run any code" in error
    assert not mark.exists()


def test_a_runs_checkpoint_of_pickles_is_refused(fresh_model, capsys):
    main(["train", "grpo", ENV, "--model", fresh_model(ENV), *QUICK.split()])
    checkpoint = max(Path("trained/checkpoints").iterdir())
    (checkpoint / "checksums.json").unlink()  # as whoever puts a pickle there would see to
    mark = pickle_weights(checkpoint)
    for arguments in (("evaluate", ENV, "--model", "trained"), ("train", "--resume", "trained")):
        assert "a pickle, which could run any code" in refused(capsys, *arguments)
    assert not mark.exists()


def test_a_critic_of_pickles_is_refused(fresh_model, config, tmp_path):
    source, folder = fresh_model(ENV), tmp_path / "reward-model"
    tokenizer = load_tokenizer(source)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"vocab_size": tokenizer.vocab_size, "eos_token_id": 0, "bos_token_id": None, "num_labels": 1}
    LlamaForSequenceClassification(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.to_transformers().save_pretrained(folder)
    mark = pickle_weights(folder)
    with pytest.raises(ValueError, match=r"no critic can begin as .*: its weights are in pytorch_model.bin, a pickle"):
        PPO(ENV, config(source, PPO, critic=str(folder)))
    assert not mark.exists()


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Calls in a file, each with what is called as it is written."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_in_the_source_unpickles_trusts_remote_code_or_asks_a_shell():
    unpickle = (
        "pickle.load",
        "torch.load",
        "np.load",
        "numpy.load",
        "joblib.load",
        "yaml.load",
        "marshal.load",
        "dill.load",
    )
    shell = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput")
    faults = []
    for path in (path for floor in ("rewards", "textenv", "agents") for path in (ROOT / floor).rglob("*.py")):
        for called, node in calls(ast.parse(path.read_text())):
            set_to = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            trusts = called.endswith(".from_pretrained") and set_to.get("trust_remote_code") != "False"
            if called.startswith(unpickle) or called in shell or set_to.get("shell", "False") != "False" or trusts:
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno} {called}")
    assert faults == []


def test_weights_are_read_in_one_place():
    """Other calls of ``from_pretrained`` read a tokenizer or a config."""
    faults = []
    for path in (path for floor in ("rewards", "textenv", "agents") for path in (ROOT / floor).rglob("*.py")):
        for called, node in calls(ast.parse(path.read_text())):
            light = called in ("AutoTokenizer.from_pretrained", "AutoConfig.from_pretrained")
            if called.endswith(".from_pretrained") and not light and path.name != "pretrained.py":
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno} {called}")
    assert faults == []


# Code that comes with a model.


@pytest.mark.parametrize("part", ["config", "tokenizer"])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_code_in_a_models_folder_is_not_run_whoever_says_yes(fresh_model, monkeypatch, part, known):
    folder = Path(fresh_model(ENV))
    mark = folder / "ran"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Evil: pass\n")
    path = folder / ("config.json" if part == "config" else "tokenizer_config.json")
    content = json.loads(path.read_text())
    if part == "config":
        content["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
        content |= {} if known else {"model_type": "evil"}
    else:
        content["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        content |= {} if known else {"tokenizer_class": "Evil"}
    path.write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with (
        nullcontext()
        if known
        else pytest.raises(ValueError, match=f"no (tokenizer|causal language model) at '{folder}'")
    ):
        load_model(folder)
    assert not mark.exists()


def test_a_chat_template_reaches_no_python(fresh_model):
    folder = Path(fresh_model(ENV))
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match=r"refuses messages .* access to attribute '__class__'"):
        load_tokenizer(folder).encode_prompt("x")


# Texts.


FIELDS = HOSTILE + "$mark ${question} $$ {question} %(question)s"


def test_a_judged_text_is_a_value_of_the_prompt_and_never_a_part_of_it(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("$question|$answer|$mark")
    filled = Prompt(path, ["question", "answer"]).fill({"question": FIELDS, "answer": FIELDS})
    assert filled.startswith(f"{FIELDS}|{FIELDS}|")
    assert filled.removeprefix(f"{FIELDS}|{FIELDS}|").isalnum()


def test_a_row_is_a_value_of_the_template_and_never_a_part_of_it():
    assert Template("{question}!").fill({"question": FIELDS}) == f"{FIELDS}!"


def acts(shown: str) -> list[str]:
    """The characters in what was shown that a terminal would act on."""
    return [character for character in shown if character != "\n" and not character.isprintable()]


class HostileTask(Task):
    """Its texts are all hostile."""

    turns = 2
    max_new_tokens = 8
    max_tokens = 400
    reward = "exact"
    system = HOSTILE

    def problem(self, seed, split, index):
        return Problem(f"{index} {HOSTILE}", HOSTILE)

    def reply(self, transcript):
        return HOSTILE

    def tokenizer(self):
        return CharTokenizer("".join(dict.fromkeys("0123456789 \n" + HOSTILE)))


@pytest.fixture
def hostile(tmp_path):
    """The id of an environment and the folder of a model whose tokens are such characters."""
    registered = dict(registry)
    register("tests/Hostile-v0", HostileTask)
    tokenizer = HostileTask().tokenizer()
    Policy(make_model("llama", vocab_size=tokenizer.vocab_size, max_position_embeddings=512), tokenizer).save("model")
    yield "tests/Hostile-v0", "model"
    registry.clear()
    registry.update(registered)
    gymnasium.registry.pop("tests/Hostile-v0", None)


@pytest.mark.parametrize("command", ["generate", "evaluate", "train"])
def test_what_a_model_and_a_data_set_wrote_reaches_the_terminal_as_text(hostile, command, capsys):
    env_id, model = hostile
    if command == "train":
        main(["train", "grpo", env_id, "--model", model, *QUICK.split()])
    else:
        main([command, env_id, "--model", model, *(["--episodes", "4"] if command == "evaluate" else [])])
    shown = capsys.readouterr()
    assert acts(shown.out) == acts(shown.err) == []
    assert "[red]<script>alert(1)</script>[/red]" in shown.out
    assert "{0.__class__}%s%n$(touch run)`touch run`␛]0;owned␇␛[31m" in shown.out
    assert not Path("run").exists()


def test_who_plays_sees_texts_and_nothing_that_acts(hostile, capsys, monkeypatch):
    answers = iter(["1", "2", ""])
    monkeypatch.setattr("builtins.input", lambda *_: next(answers))
    main(["play", hostile[0]])
    shown = capsys.readouterr().out
    assert acts(shown) == []
    assert shown.count("[red]<script>alert(1)</script>[/red]") >= 4  # system, prompt, reply, and the next problem


def test_a_human_view_shows_texts_and_nothing_that_acts(hostile, capsys):
    make_env(hostile[0], render_mode="human").reset(seed=0)
    shown = capsys.readouterr().out
    assert "␛]0;owned␇" in shown
    assert acts(shown) == []


def test_an_error_is_told_without_what_acts(capsys):
    with pytest.raises(SystemExit):
        _fail(f"the first error was:\n{HOSTILE}")
    shown = capsys.readouterr().err
    assert acts(shown) == []
    assert "[red]<script>" in shown


def test_a_scores_error_is_told_without_what_acts(capsys, monkeypatch):
    def fail(prompt, completion, reference):
        raise ValueError(completion)

    monkeypatch.setitem(registered_rewards, "hostile_error", fail)
    rows = [
        {"prompt": "", "completion": HOSTILE, "reference": None},
        {"prompt": "", "completion": "", "reference": None},
    ]
    Path("samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        main(["score", "--reward", "hostile_error", "--file", "samples.jsonl"])
    shown = capsys.readouterr()
    assert acts(shown.out) == acts(shown.err) == []
    assert "[red]<script>" in shown.out


@pytest.mark.parametrize("terminal", [True, False])
def test_a_metrics_name_is_no_format_and_no_markup(monkeypatch, capsys, terminal):
    monkeypatch.setattr(progress, "Console", lambda: Console(force_terminal=terminal, color_system=None, width=1000))
    with LiveLine("grpo", 10) as line:
        line.update(10, {f"monitor/{HOSTILE}": 0.5, "reward": 1.0})
    shown = capsys.readouterr().out
    assert "\x1b]0;owned" not in shown
    assert not set(shown) & set("\x07\x9b\u202e")
    assert "reward 1.000  monitor/{0.__class__}%s%n$(touch run)`touch run`␛]0;owned␇␛[31m" in shown


# Keys.

KEY = "sk-do-not-tell-1234567890"


def everything_in(folder: Path) -> bytes:
    """The content of all files below, unpacked."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"\n".join(
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in files
    )


def test_a_judges_key_is_in_no_file_and_no_line(fresh_model, capsys, monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, KEY)
    refusal = Fault(401, json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode())
    server = Server(lambda _, number: f"Score: 7. Your key is {KEY}" if number % 4 else refusal)
    reward = f"judge chat.model m chat.base_url {server.url} chat.cache_dir {tmp_path / 'cache'}"
    model = fresh_model("textenv/Arithmetic-v0")
    settings = f"{QUICK} --max-tokens 64 --max-ungraded 0.9".split()
    main(["train", "grpo", "textenv/Arithmetic-v0", "--model", model, *settings, "--reward", reward])
    server.close()
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err
    kept = everything_in(tmp_path)
    assert KEY.encode() not in kept
    assert b"[key]" in kept


@pytest.mark.parametrize(
    "options",
    [
        f"chat.model m chat.base_url http://127.0.0.1:1/v1 chat.api_key {KEY}",
        f"chat.model m chat.base_url http://127.0.0.1:1/v1 api_key {KEY}",
        f"chat.model m chat.base_url http://127.0.0.1:1/v1 chat.key_env {KEY}",
        f"chat.model m chat.base_url http://me:{KEY}@127.0.0.1:1/v1",
        f"chat.model m chat.base_url http://127.0.0.1:1/v1?key={KEY}",
        f"chat.model m chat.api_key {KEY}",
    ],
)
def test_a_key_among_the_options_is_refused_before_it_is_kept_or_repeated(fresh_model, capsys, tmp_path, options):
    model = fresh_model(ENV)
    error = refused(capsys, "train", "grpo", ENV, "--model", model, *QUICK.split(), "--reward", f"judge {options}")
    assert "key" in error
    assert KEY not in error
    assert KEY.encode() not in everything_in(tmp_path)


# Budgets.


def test_what_a_judge_may_spend_is_one_budget_over_a_stop_and_a_resume(fresh_model, config, tmp_path):
    server = Server(lambda *_: "Score: 7")
    model = fresh_model("textenv/Arithmetic-v0")
    settings = config(
        model,
        reward=f"judge chat.model m chat.base_url {server.url}",
        max_tokens=64,
        prompts_per_step=1,
        total_episodes=16,
        eval_episodes=4,
    )
    GRPO("textenv/Arithmetic-v0", settings).learn(callback=lambda training: training.step < 2)
    paid = len(server.bodies)
    resumed = GRPO("textenv/Arithmetic-v0", settings, resume=True)
    spent = resumed.reward.chat.calls
    assert resumed.rollout("eval").reward is resumed.reward
    resumed.learn()
    assert resumed.reward.chat.calls == spent + len(server.bodies) - paid
    server.close()
    # All that was paid until the checkpoint: the evaluation that followed it is not in it.
    assert 0 < spent <= paid <= spent + 4
