"""What is wrong with a command or its files is said in one line that names it, before a model is loaded."""
from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import grade
from fast_start import ROOT
from soak import make_world
from transformers import PreTrainedModel

import data
import toy
from data import UserError
from polaris_mini import Common
from rollout import load_model

FILES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"problem": "1 + 1", "answer": "2"}\n{"problem": \n',
    "list.jsonl": "[1, 2]\n",
    "no_answer.jsonl": '{"problem": "1 + 1"}\n',
    "twice.jsonl": '{"id": "7", "problem": "1 + 1", "answer": "2"}\n{"id": "7", "problem": "1 + 2", "answer": "3"}\n',
    "ungradable.jsonl": '{"id": "1", "problem": "a", "answer": "1"}\n{"id": "2", "problem": "b", "answer": "$$"}\n',
    "rate.jsonl": '{"problem": "1 + 1", "answer": "2", "pass_rate": 7}\n',
    "table.csv": "problem,answer\n1 + 1,2\n",
    "not.parquet": "PAR1",
    "examples.jsonl": '{"problem": "1 + 1"}\n',
    "sums.jsonl": "".join(json.dumps({"problem": p.text, "answer": p.answers[0]}) + "\n"
                          for p in toy.toy_problems(60, seed=5)),
    "scores.jsonl": "".join(json.dumps({"id": i, "problem": f"{i}?", "answer": "1", "pass_rate": i / 4}) + "\n"
                            for i in (0, 3)),
    "unmeasured.jsonl": '{"id": "a", "problem": "a?", "answer": "1", "pass_rate": 0}\n'
                        '{"id": "b", "problem": "b?", "answer": "1"}\n',
    "responses.jsonl": '{"response": "\\\\boxed{1}", "answer": "1"}\n',
    "cut.jsonl": '{"response": "", "answer": "1"}\n{"response": \n',
    "no_response.jsonl": '{"answer": "1"}\n',
    "number.jsonl": '{"response": 5, "answer": "1"}\n',
    "unanswered.jsonl": '{"response": "a", "answer": null}\n',
    "config_only/config.json": "{}",
    "pickled/config.json": "{}", "pickled/pytorch_model.bin": "", "pickled/tokenizer.json": "{}",
    "own_code/config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}',
    "own_code/mine.py": "raise SystemExit('this code ran')\n", "own_code/model.safetensors": "",
    "learned/config.json": '{"model_type": "gpt2", "n_positions": 64, "vocab_size": 50}',
    "few_rows/config.json": '{"model_type": "qwen3", "vocab_size": 9}',
    "named/config.json": "{}", "named/additional_chat_templates/a.jinja": "",
    "named/additional_chat_templates/b.jinja": "",
    "adapter/adapter_config.json": '{"base_model_name_or_path": "./no_base"}',
    "damaged_run/config.json": '{"lr": ',
    "other_run/config.json": '{"learning_rate": 1, "stages": []}',
    "no_function.py": "score = 5\n", "wrong.py": "import nothing_of_that_name\n",
}  # fmt: skip
REAL = "--model model --data sums.jsonl --prompts-per-step 8 --eval-problems 8"
PROBLEMS = "--model model --data sums.jsonl"

CASES = {  # what our own modules say, in one line
    "train.py": [
        ("--preset tyo", "preset is tyo: give one of recipe"),
        ("--device cuda:99x", "device is cuda:99x: give auto"), ("--device mps", "device is mps: PyTorch sees no such"),
        # problems
        ("--data nowhere.jsonl", "nowhere.jsonl: cannot be read"),
        ("--data model", "model/config.json, row 1: is 'architectures': give an object"),
        ("--data nothing", "nothing: cannot be read"), ("--data table.csv", "table.csv, line 1: not JSON"),
        ("--data empty.jsonl", "empty.jsonl: has no row that can be used"),
        ("--data broken.jsonl", "broken.jsonl, line 2: not JSON"),
        ("--data list.jsonl", "list.jsonl, line 1: is [1, 2]: give an object"),
        ("--data no_answer.jsonl", "no_answer.jsonl, line 1: columns are problem: give problem (or question)"),
        ("--data twice.jsonl", "twice.jsonl, line 2: id is 7, as in twice.jsonl, line 1"),
        ("--data ungradable.jsonl", "ungradable.jsonl, line 2: answer"),
        ("--data rate.jsonl", "rate.jsonl, line 1: pass rate is 7"),
        ("--data not.parquet", "not.parquet: cannot be read"),
        ("--data sums.jsonl --eval-problems 60", "prompts_per_step is 32, but 0 training problems are left"),
        ("--data sums.jsonl --eval-data nowhere.jsonl", "nowhere.jsonl: cannot be read"),
        ("--data sums.jsonl --eval-data sums.jsonl", "0 training problems are left"),
        ("--model model", "data is missing: give --model and --data"),
        (f"{REAL} --prompts-per-step 128", "prompts_per_step is 128, but 52 training problems are left"),
        (f"{REAL} --max-prompt-tokens 3", "more than 3 tokens"),
        (f"{REAL} --max-prompt-tokens 3", "--max-prompt-tokens"),
        # models
        (f"{REAL} --model ./nowhere", "model is ./nowhere: its tokenizer does not load"),
        (f"{REAL} --model config_only", "model is config_only: its tokenizer does not load"),
        (f"{REAL} --model own_code", "model is own_code: it does not load"),
        (f"{REAL} --model own_code", "trust_remote_code"),
        (f"{REAL} --model pickled", "model is pickled: it does not load"),
        (f"{REAL} --model learned --prompt-suffix= --max-response-tokens 64",
         "model is learned: the model has 64 positions"),
        (f"{REAL} --model few_rows", "the embedding has 9 rows"),
        (f"{REAL} --model named", "model is named: its chat templates are a, b, and none is default"),
        (f"{REAL} --model adapter", "model is adapter: the base of this adapter, ./no_base, is no folder"),
        # rewards
        ("--reward nowhere:score", "reward is nowhere:score: ModuleNotFoundError: No module named 'nowhere'"),
        ("--reward no_function", "reward is no_function: "), ("--reward wrong:score", "nothing_of_that_name"),
        ("--reward no_function:scores", "has no attribute 'scores'"),
        ("--reward no_function:score", "reward is no_function:score: "),
        # runs
        ("--resume nowhere", "resume is nowhere: "), ("--resume damaged_run", "resume is damaged_run: "),
        ("--resume other_run", "learning_rate"),
        ("--run-dir model", "run_dir is model: it exists already; go on with --resume model"),
        ("--run-dir sums.jsonl/run", "run_dir is sums.jsonl/run: nothing can be made in /"),
    ],
    "tools/report.py": [
        ("", "report needs a run, and runs/ has none: python tools/report.py RUN [RUN...]"),
        ("nowhere", "nowhere: no metrics.jsonl"),
    ],
    "tools/track.py": [("nowhere --to tensorboard", "run is nowhere: there is no run in it")],
    "tools/export_verl.py": [
        ("--model model", "data is missing"),
        (f"{REAL} --prompts-per-step 99", "prompts_per_step is 99, but 52 training problems"),
        (f"{REAL} --updates-per-batch 3", "updates_per_batch is 3: on verl it must divide"),
        (f"{REAL} --gpus 0", "gpus is 0: give at least 1"), (f"{REAL} --machines 0", "machines is 0: give at least 1"),
        (f"{REAL} --reward no_function:score", "reward is no_function:score: leave it out, and name"),
        (f"{REAL} --stages 5:auto:20", "the temperature of stage 1 is auto: choose it with"),
        (f"{REAL} --out sums.jsonl", "out is sums.jsonl: it exists already; give another"),
        (f"{REAL} --model ./nowhere", "model is ./nowhere: no config.json of it can be read"),
    ],
    "tools/ablate.py": [
        ("rescue --options=--resume=damaged_run", "resume is damaged_run"),
        ("rescue --options=--eval-every=-1", "eval_every is -1: evaluations are compared; give 0 or more"),
        ("length --options=--stages=5:1.0:64", "options has stages: a variant sets it too; leave it out"),
        ("temperature --options=--temperature=1.2", "options has stages: a variant sets it too; leave it out"),
        ("rescue --variant=problems:--lr=1", "variant is problems: give each a name of its own, other than problems,"),
        ("rescue --variant=On:--lr=1 --variant=a:--lr=2", "variant is On, a: give each a name of its own"),
    ],
    "tools/plan.py": [
        ("--gpu-memory 0", "gpu_memory is 0.0"), ("--run nowhere", "resume is nowhere: "),
        ("--model ./nowhere", "model is ./nowhere: no config.json of it can be read"),
    ],
    "tools/evaluate.py": [
        ("eval --model ./nowhere --data sums.jsonl", "model is ./nowhere: its tokenizer does not load"),
        (f"eval {PROBLEMS} no.jsonl", "no.jsonl: cannot be read"),
        (f"eval {PROBLEMS} --out sums.jsonl", "sums.jsonl is no folder: give another --out"),
        ("eval --model config_only --data sums.jsonl", "model is config_only: its tokenizer does not load"),
        (f"eval {PROBLEMS} --model learned --prompt-suffix=", "model is learned: the model has 64 positions"),
        (f"eval {PROBLEMS} --model few_rows", "model is few_rows: a prompt has token"),
        (f"eval {PROBLEMS} --model learned --prompt-suffix= --max-response-tokens 8 --yarn-factor 2",
         "yarn_factor is 2: learned (gpt2) has no rotary positions"),
        (f"measure {PROBLEMS} --model adapter", "model is adapter: the base of this adapter, ./no_base, is no folder"),
        (f"probe {PROBLEMS} --temperatures 1:0.2:0.2", "temperatures is 1:0.2:0.2: give START:END:STEP"),
        (f"probe {PROBLEMS} --temperatures 0.6,warm", "temperatures is 0.6,warm: give START:END:STEP"),
        (f"measure {PROBLEMS} --out .", "Is a directory"),  # as the operating system says it
        (f"measure {PROBLEMS} --out sums.jsonl", "sums.jsonl: exists and is not a file of this command"),
        (f"measure {PROBLEMS} --out out.jsonl --reward nowhere:score", "No module named 'nowhere'"),
    ],
    "tools/difficulty.py": [
        ("filter --scores scores.jsonl --out out.csv", "--out out.csv: give a name"),
        ("filter --scores scores.jsonl --out no/out.jsonl", "--out no/out.jsonl: there is no folder no: m"),
        ("filter --scores scores.jsonl --out scores.jsonl", "--out scores.jsonl: exists already: give anoth"),
        ("filter --scores score.jsonl --out out.jsonl", "score.jsonl: cannot be read"),
        ("filter --scores unmeasured.jsonl --out out.jsonl",
         "unmeasured.jsonl: problem b has no pass rate: measure first (python tools/evaluate.py measure)"),
        ("filter --scores scores.jsonl --out out.jsonl --min-pass-rate 1 --max-pass-rate 1",
         "scores.jsonl: no problem has a pass rate from 1.0 to 1.0: widen the range"),
        *((f"filter --scores scores.jsonl --out out.jsonl {limit}", "give shares, 0 <= min <= max <= 1") for limit in (
            "--min-pass-rate 1", "--max-pass-rate 8", "--min-pass-rate -1", "--max-pass-rate nan")),
        ("histogram", "histogram has no file: give one"), ("histogram no.jsonl", "no.jsonl: cannot be read"),
        ("histogram scores.jsonl unmeasured.jsonl", "unmeasured.jsonl: problem b has no pass rate: measure first"),
        ("histogram scores.jsonl --out scores.jsonl", "--out scores.jsonl: give a name that ends in .png"),
        ("histogram scores.jsonl --out no/out.png", "--out no/out.png: there is no folder no: make it first"),
    ],
    "tools/toy.py": [("--out sums.jsonl", "out is sums.jsonl: it exists already")],
    "tools/warmup.py": [
        ("--model model --data nowhere.jsonl --out out", "nowhere.jsonl: cannot be read"),
        ("--model model --data examples.jsonl --out out", "examples.jsonl, line 1: response is None"),
    ],
    "tools/grade.py": [
        ("", "the following arguments are required: file"), ("nowhere.jsonl", "No such file"),
        ("model", "Is a directory"),
        ("cut.jsonl", "line 2: no JSON object"), ("list.jsonl", "line 1: no JSON object"),
        ("no_response.jsonl", "line 1: field 'response' is missing"), ("number.jsonl", "line 1: field 'response'"),
        ("unanswered.jsonl", "line 1: field 'answer' is missing"),
        ("responses.jsonl --timeout 0", "timeout is 0.0: give a number above 0"),
        ("responses.jsonl --workers none", "argument --workers: invalid int value: 'none'"),
        ("responses.jsonl --workers 0", "workers is 0: give a number above 0"),
        ("responses.jsonl --reward wrong:score", "nothing_of_that_name"), ("responses.jsonl --fast", "--fast"),
    ],
}  # fmt: skip

SETTINGS = {  # what tyro says, or shows of what a configuration says of its values
    "train.py": [
        ("--temprature 1", "--temprature, 1"), ("--temprature 1", "--temperature"), ("stray", "stray"),
        ("--lr", "'--lr'"),
        ("--lr abc", "'abc'"), ("--seed 1.5", "'1.5'"), ("--optimizer adam", "'adam'"), ("--optimizer adam", "'sgd'"),
        ("--temperature warm", "'warm'"), ("--dtype int8", "'int8'"),
        ("--stages 10:1.0", "stages has 10:1.0: give STEPS:TEMPERATURE:TOKENS"),
        ("--stages 10:1.0:20:plato", "stages has 10:1.0:20:plato"),
        ("--stages 10:1.0:20 5:0:20", "temperature is 0.0"), ("--stages 0:1.0:20", "0:1.0:20"),
        ("--stages 5:1.0:20 5:auto:20", "the first stage must be auto too"),
        ("--group-size 1", "group_size is 1: give at least 2"), ("--steps 0", "steps is 0: give at least 1"),
        ("--temperature 0", "temperature is 0.0: give auto or a value above 0"),
        ("--temperature nan", "temperature is nan: give auto or a value above 0"),
        ("--max-response-tokens 0", "max_response_tokens is 0: give at least 1"),
        ("--lr 0", "lr is 0.0: give a value above 0"), ("--lr nan", "lr is nan"), ("--lr inf", "lr is inf"),
        ("--max-grad-norm -1", "max_grad_norm is -1.0: give a value above 0"),
        ("--weight-decay -1", "weight_decay is -1.0"), ("--beta1 1", "beta1 is 1.0"), ("--beta2 -1", "beta2 is -1.0"),
        ("--clip-low 1", "clip_low is 1.0"), ("--clip-high 0", "clip_high is 0.0"),
        ("--dual-clip 1", "dual_clip is 1.0"), ("--mastered-above 2", "mastered_above is 2.0: give a pass rate"),
        ("--prompts-per-step 0", "prompts_per_step is 0"), ("--updates-per-batch 99", "updates_per_batch is 99"),
        ("--tokens-per-micro-batch 0", "tokens_per_micro_batch is 0"),
        ("--checkpoint-every 0", "checkpoint_every is 0"), ("--keep-checkpoints 0", "keep_checkpoints is 0"),
        ("--eval-every -2", "eval_every is -2"), ("--eval-temperature 0", "eval_temperature is 0.0"),
        ("--reward-timeout 0", "reward_timeout is 0.0"), ("--reward-workers 0", "reward_workers is 0"),
        ("--engine-timeout nan", "engine_timeout is nan"), ("--lora-rank -1", "lora_rank is -1"),
        ("--lora-alpha 0", "lora_alpha is 0"),
        ("--quantize-base", "quantize_base is True: it is for LoRA; give --lora-rank 32"),
        ("--offload-activations", "offload_activations is True: it needs --gradient-checkpointing"),
        ("--probe-temperatures 1.0:0.5:0.1", "temperatures is 1.0:0.5:0.1: give START:END:STEP"),
    ],
    "tools/evaluate.py": [
        ("sample", "sample"), ("eval --data sums.jsonl", "--model"), (f"eval {PROBLEMS} --top-p 0", "top_p is 0.0"),
        (f"eval {PROBLEMS} --rollouts 0", "rollouts is 0: give at least 1"),
        (f"eval {PROBLEMS} --yarn-factor 0.5", "yarn_factor is 0.5: give 1"),
        (f"eval {PROBLEMS} --yarn-attention-scale 0", "yarn_attention_scale is 0.0"),
        (f"eval {PROBLEMS} --limits 20 10", "limits is (20, 10): give rising"),
        (f"eval {PROBLEMS} --length-bounds 0 10", "length_bounds is (0, 10): give rising"),
        (f"eval {PROBLEMS} --max-response-tokens 0", "max_response_tokens is 0: give at least 1"),
        (f"probe {PROBLEMS} --top-k -1", "top_k is -1"), (f"probe {PROBLEMS} --match-diversity much", "'much'"),
        (f"measure {PROBLEMS} --rollouts 0", "rollouts is 0: give at least 1"),
        (f"measure {PROBLEMS} --problems -1", "problems is -1"),
        (f"measure {PROBLEMS} --temperature 0", "temperature is 0.0: give a value above 0"),
        (f"measure {PROBLEMS} --temperature nan", "temperature is nan"),
        (f"measure {PROBLEMS} --warmth 1", "--warmth, 1"),
    ],
    "tools/export_verl.py": [("--modle x", "--modle, x")],
    "tools/ablate.py": [
        ("--sead 1", "--sead, 1"), ("--seeds many", "'many'"), ("resque", "regime is resque: give all or one of"),
        ("rescue --seeds 0", "seeds is 0, jobs 2: give at least 1"),
        ("rescue --variant stored", "variant is stored: give 'NAME: OPTIONS'"),
        ("rescue --options=--seed=7", "options has seed: the regime sets it for every run"),
    ],
    "tools/plan.py": [("--gpu-memory big", "'big'"), ("--gpuz 1", "--gpuz, 1")],
    "tools/difficulty.py": [("sort", "sort"), ("filter", "--scores"),
                            ("filter --scores scores.jsonl --out a.jsonl --layout odd", "'odd'")],
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("pickled", "own_code", "learned", "few_rows", "named"):
        for tokenizer in (folder / "model").glob("token*"):
            shutil.copy(tokenizer, folder / name)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts}


def of(cases: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str, str]]:
    return [(script, *case) for script in cases for case in cases[script]]


@pytest.fixture
def shown_by(world, monkeypatch, capfd):
    """Run `python SCRIPT ARGUMENTS` in this process, as importing torch again would take minutes; return stderr."""
    def call(script: str, arguments: str) -> str:
        def weights(*_, **__):
            raise AssertionError("weights were loaded")

        monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", weights)
        monkeypatch.chdir(world)
        monkeypatch.setattr(sys, "argv", [script, *arguments.split()])
        before = content(world)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        shown = capfd.readouterr().err
        assert ended.value.code == 2, shown
        assert content(world) == before  # nothing was written
        return shown

    return call


@pytest.mark.parametrize(("script", "arguments", "expected"), of(CASES))
def test_bad_input_ends_in_one_line(script, arguments, expected, shown_by):
    shown = shown_by(script, arguments)
    assert re.fullmatch(rf"{re.escape(Path(script).name)}: error: .*{re.escape(expected)}.*\n", shown), shown


@pytest.mark.parametrize(("script", "arguments", "expected"), of(SETTINGS))
def test_bad_setting_is_named(script, arguments, expected, shown_by):
    shown = shown_by(script, arguments)
    assert expected in " ".join(re.sub("[│─╭╮╰╯]", " ", shown).split()), shown


def test_nothing_of_a_data_file_is_evaluated(world, monkeypatch):
    """Problems and answers that are code in Python, in templates and in LaTeX."""
    trap = world / "trap"
    monkeypatch.chdir(world)
    for code in (f"__import__('os').mkdir('{trap}')", "{{ cycler.__init__.__globals__.os.mkdir('trap') }}",
                 "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
                 f"\\boxed{{__import__('os').mkdir('{trap}')}}", "\\input{/etc/passwd}",
                 "\\immediate\\write18{mkdir trap}"):
        assert grade(f"\\boxed{{{code}}}", code, require_think=False).reason in ("correct", "wrong", "invalid_gold")
        (world / "code.jsonl").write_text(json.dumps({"problem": code, "answer": "1"}) + "\n")
        tokenizer = toy.toy_tokenizer()
        tokenizer.chat_template = None
        (problem,) = data.load_problems("code.jsonl")
        (problem,) = data.encode_prompts([problem], tokenizer, Common(prompt_suffix=""))
        assert problem.text == code
    assert not trap.exists()
    (world / "code.jsonl").unlink()


@pytest.mark.parametrize("command", ["train.py --data no.jsonl", "tools/difficulty.py histogram no.jsonl"])
def test_bad_input_in_a_process_of_its_own(command, tmp_path):
    ended = subprocess.run([sys.executable, *f"{ROOT}/{command}".split()], capture_output=True, text=True, check=False,
                           cwd=tmp_path)
    assert ended.returncode == 2
    assert re.fullmatch(r"\w+\.py: error: no.jsonl: .*: give .*\n", ended.stderr), ended.stderr


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_a_package_that_is_not_installed_is_named(world, monkeypatch, capfd):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["train.py", *REAL.split(), "--attention", "flash_attn"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert ended.value.code == 2
    assert re.search(r"^train.py: error: .*flash_attn.*\n\Z", capfd.readouterr().err, re.MULTILINE)


def test_pickled_weights_are_not_loaded(world):
    """They can run code."""
    settings = Common(device="cpu")
    model = load_model(str(world / "model"), settings, torch.float32)
    folder = world / "only_pickled"
    shutil.copytree(world / "model", folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model is .*only_pickled: it does not load .*safetensors"):
        load_model(str(folder), settings, torch.float32)


@pytest.mark.parametrize(("source", "there"), [
    ("no_file", "[]"), ("mixed", "['a.jsonl', 'b.json']"), ("mixed:train", "['a.jsonl', 'b.json']"),
    ("splits:val", "['test.jsonl', 'train-0.jsonl']"), ("saved:tst", "['dataset_dict.json', 'train']"),
])
def test_a_folder_that_is_no_data_set_ends_in_one_line(world, source, there, shown_by):
    for name in ("no_file/", "mixed/a.jsonl", "mixed/b.json", "splits/test.jsonl", "splits/train-0.jsonl",
                 "saved/dataset_dict.json", "saved/train/"):
        (world / name.rpartition("/")[0]).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            (world / name).touch()
    assert re.fullmatch(rf"train.py: error: {source}: cannot be read \(a folder needs files of one kind( that begin.*)?"
                        rf", and has {re.escape(there)}\): give .*\n", shown_by("train.py", f"--data {source}"))
