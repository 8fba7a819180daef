"""What is wrong with a command or its files is said in one line that names it, before a model is loaded."""
from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fast_start import ROOT
from soak import make_world
from transformers import PreTrainedModel

import data

FILES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"problem": "1 + 1", "answer": "2"}\n{"problem": \n',
    "list.jsonl": "[1, 2]\n",
    "no_answer.jsonl": '{"problem": "1 + 1"}\n',
    "twice.jsonl": '{"id": "7", "problem": "1 + 1", "answer": "2"}\n{"id": "7", "problem": "1 + 2", "answer": "3"}\n',
    "ungradable.jsonl": '{"id": "1", "problem": "a", "answer": "1"}\n{"id": "2", "problem": "b", "answer": "$$"}\n',
    "words.jsonl": '{"problem": "1 + 1", "answer": "2"}\n{"problem": "Two?", "answer": "2"}\n',
    "rate.jsonl": '{"problem": "1 + 1", "answer": "2", "pass_rate": 7}\n',
    "table.csv": "problem,answer\n1 + 1,2\n",
    "not.parquet": "PAR1",
    "examples.jsonl": '{"problem": "1 + 1"}\n',
    "sums.jsonl": "".join(json.dumps({"problem": p.text, "answer": p.answers[0]}) + "\n"
                          for p in data.toy_problems(60, seed=5)),
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
    "damaged_run/config.json": '{"lr": ',
    "other_run/config.json": '{"learning_rate": 1, "stages": []}',
    "no_function.py": "score = 5\n", "wrong.py": "import nothing_of_that_name\n",
}  # fmt: skip
REAL = "--model model --data sums.jsonl --prompts-per-step 8 --eval-problems 8"

CASES = {
    "train.py": [
        # options that are not there, or whose values are none
        ("--temprature 1", "Unrecognized options: --temprature, 1"), ("--temprature 1", "--temperature"),
        ("stray", "Unrecognized options: stray"), ("--lr", "Missing value for argument '--lr'"),
        ("--lr abc", "--lr: could not convert string to float: 'abc'"), ("--seed 1.5", "--seed: invalid literal"),
        ("--optimizer adam", "'adam' for argument '--optimizer'. Expected one of ('adamw', 'adamw8bit', 'sgd')"),
        ("--temperature warm", "--temperature: no type matching"),
        ("--preset tyo", "preset is tyo: give one of recipe"),
        ("--stages 10:1.0", "STEPS:TEMPERATURE:TOKENS"), ("--stages 10:1.0:20:plato", "STEPS:TEMPERATURE:TOKENS"),
        # values that cannot be
        ("--group-size 1", "group_size is 1: give at least 2"), ("--steps 0", "steps is 0: give at least 1"),
        ("--temperature 0", "temperature is 0.0: give auto or a value above 0"),
        ("--temperature nan", "temperature is nan: give auto or a value above 0"),
        ("--stages 10:1.0:20 5:0:20", "temperature is 0.0"), ("--stages 0:1.0:20", "stages[1].steps is 0"),
        ("--max-response-tokens 0", "max_response_tokens is 0: give at least 1"),
        ("--lr 0", "lr is 0.0: give a value above 0"), ("--lr nan", "lr is nan"), ("--lr inf", "lr is inf"),
        ("--max-grad-norm -1", "max_grad_norm is -1.0: give a value above 0"),
        ("--weight-decay -1", "weight_decay is -1.0"), ("--beta1 1", "beta1 is 1.0"), ("--beta2 -1", "beta2 is -1.0"),
        ("--clip-low 1", "clip_low is 1.0: give a value between 0 and 1"), ("--clip-high 0", "clip_high is 0.0"),
        ("--dual-clip 1", "dual_clip is 1.0"), ("--mastered-above 2", "mastered_above is 2.0: give a pass rate"),
        ("--prompts-per-step 0", "prompts_per_step is 0"), ("--updates-per-batch 99", "updates_per_batch is 99"),
        ("--tokens-per-micro-batch 0", "tokens_per_micro_batch is 0"),
        ("--checkpoint-every 0", "checkpoint_every is 0"),
        ("--keep-checkpoints 0", "keep_checkpoints is 0"), ("--eval-every -2", "eval_every is -2: give steps"),
        ("--eval-temperature 0", "eval_temperature is 0.0"), ("--reward-timeout 0", "reward_timeout is 0.0"),
        ("--reward-workers 0", "reward_workers is 0"), ("--engine-timeout nan", "engine_timeout is nan"),
        ("--lora-rank -1", "lora_rank is -1"), ("--lora-alpha 0", "lora_alpha is 0"),
        ("--quantize-base", "quantize_base is True: it is for LoRA; give --lora-rank 32"),
        ("--offload-activations", "offload_activations is True: it needs --gradient-checkpointing"),
        ("--mlp-chunk-tokens 9", "mlp_chunk_tokens is 9: it needs --gradient-checkpointing"),
        ("--lora-rank 4 --trained-weights bfloat16", "trained_weights is bfloat16: LoRA adapters are small"),
        ("--dtype float16 --trained-weights bfloat16", "trained_weights is bfloat16: with dtype float16 give float32"),
        ("--probe-temperatures 1.0:0.5:0.1", "temperatures is 1.0:0.5:0.1: give START:END:STEP"),
        ("--process-reward core", "let it ask for intermediate results"),
        ("--min-overlap 0.5", "min_overlap is 0.5: it needs --process-reward core"),
        ("--device cuda:99x", "device is cuda:99x: give auto"), ("--device mps", "only cpu and cuda are supported"),
        (f"{REAL} --attention flash_attn", "attention is flash_attn: it needs a GPU"),
        (f"{REAL} --track wandb", "track is wandb: not installed"),
        # problems
        ("--data nowhere.jsonl", "nowhere.jsonl: there is no such file"),
        ("--data scors.jsonl", "did you mean scores.jsonl"),
        ("--data model", "model: is a folder: give one of the files"),
        ("--data nothing", "'nothing' is neither a file"), ("--data table.csv", "the suffix .csv is not known"),
        ("--data empty.jsonl", "empty.jsonl: is empty"), ("--data broken.jsonl", "broken.jsonl, line 2: not JSON"),
        ("--data list.jsonl", "list.jsonl, line 1: is [1, 2]: give an object"),
        ("--data no_answer.jsonl", "no_answer.jsonl, line 1: answer or answers is missing"),
        ("--data twice.jsonl", "twice.jsonl, line 2: id is 7, as in twice.jsonl, line 1"),
        ("--data ungradable.jsonl", "ungradable.jsonl, line 2: answer"),
        ("--data rate.jsonl", "rate.jsonl, line 1: pass rate is 7"), ("--data not.parquet", "not.parquet: not parquet"),
        ("--data words.jsonl --eval-problems 1", "the toy model reads sums only"),
        ("--data sums.jsonl --eval-problems 60", "--eval-problems is 60: give less than the 60 problems"),
        ("--data sums.jsonl --eval-data nowhere.jsonl", "nowhere.jsonl: there is no such file"),
        ("--data sums.jsonl --eval-data sums.jsonl", "every training problem is also in the evaluation"),
        ("--warmup nowhere.jsonl", "nowhere.jsonl: there is no such file"),
        ("--warmup examples.jsonl", "examples.jsonl, line 1: response is missing"),
        (f"{REAL} --prompt-examples empty.jsonl", "empty.jsonl: is empty; give at least one worked example"),
        ("--model model", "model is model, but data is missing: give --data"),
        (f"{REAL} --prompts-per-step 128", "prompts_per_step is 128, but there are 52"),
        (f"{REAL} --max-prompt-tokens 3", "more than 3: raise --max-prompt-tokens"),
        # models
        (f"{REAL} --model ./nowhere", "model is ./nowhere: no such folder"),
        (f"{REAL} --model config_only", "model is config_only: the folder has no tokenizer"),
        (f"{REAL} --model pickled", "model is pickled: its weights are pickled, which can run code as they are loaded"),
        (f"{REAL} --model pickled", "--allow-pickled-weights"),
        (f"{REAL} --model own_code", "model is own_code: it brings code of its own; read it, then give "
                                     "--trust-remote-code"),
        # rewards
        ("--reward nowhere:score", "reward is nowhere:score: ModuleNotFoundError: No module named 'nowhere'"),
        ("--reward no_function", "reward is no_function: "), ("--reward wrong:score", "nothing_of_that_name"),
        ("--reward no_function:scores", "has no attribute 'scores'"),
        ("--reward no_function:score", "reward is no_function:score: TypeError: 5 is no function"),
        # runs
        ("--resume nowhere", "resume is nowhere: there is no run in it"),
        ("--resume damaged_run", "resume is damaged_run: its config.json is damaged"),
        ("--resume other_run", "its config.json is damaged or of another version"),
        ("--run-dir model", "run_dir is model: it exists already; go on with --resume model"),
        ("--run-dir sums.jsonl/run", "run_dir is sums.jsonl/run: nothing can be made in /"),
    ],
    "tools/report.py": [
        ("", "report needs a run, and runs/ has none: python tools/report.py RUN [RUN...]"),
        ("nowhere", "nowhere: no metrics.jsonl"),
    ],
    "tools/export_verl.py": [
        ("", "model is toy: give --model"), ("--modle x", "Unrecognized options: --modle, x"),
        ("--model model", "model is model, but data is missing"),
        (f"{REAL} --prompts-per-step 99", "prompts_per_step is 99, but there are 52 training problems"),
        (f"{REAL} --updates-per-batch 3", "updates_per_batch is 3: on verl it must divide"),
        (f"{REAL} --gpus 0", "gpus is 0: give at least 1"), (f"{REAL} --machines 0", "machines is 0: give at least 1"),
        (f"{REAL} --reward no_function:score", "reward is no_function:score: leave it out, and name"),
        (f"{REAL} --stages 5:1.0:20 5:auto:20", "the temperature of stage 2 is auto: choose it with"),
        (f"{REAL} --out sums.jsonl", "out is sums.jsonl: it exists already; give another"),
        (f"{REAL} --model ./nowhere", "model is ./nowhere: no config.json of it can be read"),
    ],
    "tools/ablate.py": [
        ("--resume damaged_run", "resume is damaged_run"), ("--track tensorboard", "or track is set"),
        ("--seeds 0", "seeds is 0"), ("--target 2", "target 2.0: give at least 1, and a pass rate"),
        ("--sead 1", "Unrecognized options: --sead, 1"), ("--seeds many", "--seeds: invalid literal"),
    ],
    "tools/plan.py": [
        ("--gpu-memory 0", "gpu_memory is 0.0"), ("--gpus 0", "gpus 0: give GiB above 0, and at least 1"),
        ("--gpu-memory big", "--gpu-memory: could not convert"), ("--gpuz 1", "Unrecognized options: --gpuz"),
        ("--model ./nowhere", "model is ./nowhere: no config.json of it can be read"),
        ("--run nowhere", "resume is nowhere: there is no run in it"),
    ],
    "tools/evaluate.py": [
        ("sample", "command is sample: give one of measure, probe, eval"),
        ("eval --model ./nowhere", "model is ./nowhere: no such folder; give a folder or a hub name"),
        ("eval --model model --data toy no.jsonl", "no.jsonl: there is no such file"),
        ("eval --model model --data nothing", "'nothing' is neither a file nor the name of a hub data set"),
        ("eval --top-p 0", "top_p is 0.0: give a share above 0, 1 at most"),
        ("eval --rollouts 0", "rollouts is 0: give at least 1"),
        ("eval --yarn-factor 0.5", "yarn_factor is 0.5: give 1"),
        ("eval --yarn-attention-scale 0", "yarn_attention_scale is 0.0"),
        ("eval --limits 20 10", "limits is (20, 10): give rising"),
        ("eval --length-bounds 0 10", "length_bounds is (0, 10): give rising"),
        ("eval --max-response-tokens 0", "max_response_tokens is 0: give at least 1"),
        ("eval --out sums.jsonl --model model", "sums.jsonl is no folder: give another --out"),
        ("eval --model pickled --data sums.jsonl", "its weights are pickled"),
        ("probe --model model --temperatures 1:0.2:0.2", "temperatures is 1:0.2:0.2: give START:END:STEP"),
        ("probe --model model --temperatures 0.6,warm", "temperatures is 0.6,warm: give START:END:STEP"),
        ("probe --top-k -1", "top_k is -1"), ("probe --match-diversity much", "--match-diversity"),
        ("measure --model model --out .", "Is a directory"),  # as the operating system says it
        ("measure --model model --out sums.jsonl", "sums.jsonl: exists and is not a file of this command"),
        ("measure --rollouts 0", "rollouts is 0: give at least 1"), ("measure --problems -1", "problems is -1"),
        ("measure --temperature 0", "temperature is 0.0: give a value above 0"),
        ("measure --temperature nan", "temperature is nan"),
        ("measure --warmth 1", "Unrecognized options: --warmth, 1"),
        ("measure --model model --data sums.jsonl --reward nowhere:score", "No module named 'nowhere'"),
    ],
    "tools/difficulty.py": [
        ("sort", "Unrecognized options: sort"), ("filter", "--scores"),
        ("filter --scores scores.jsonl --out a.jsonl --layout odd", "'odd' for argument '--layout'"),
        ("filter --scores scores.jsonl --out out.csv", "--out out.csv: give a name"),
        ("filter --scores scores.jsonl --out no/out.jsonl", "--out no/out.jsonl: there is no folder no: m"),
        ("filter --scores scores.jsonl --out scores.jsonl", "--out scores.jsonl: exists already: give anoth"),
        ("filter --scores score.jsonl --out out.jsonl", "no such file: did you mean scores.jsonl"),
        ("filter --scores scores --out out.jsonl", "'scores' is neither a file nor"),
        ("filter --scores unmeasured.jsonl --out out.jsonl",
         "unmeasured.jsonl: problem b has no pass rate: measure first (python tools/evaluate.py measure)"),
        ("filter --scores scores.jsonl --out out.jsonl --min-pass-rate 1 --max-pass-rate 1",
         "scores.jsonl: no problem has a pass rate from 1.0 to 1.0: widen the range"),
        *((f"filter --scores scores.jsonl --out out.jsonl {limit}", "give shares, 0 <= min <= max <= 1") for limit in (
            "--min-pass-rate 1", "--max-pass-rate 8", "--min-pass-rate -1", "--max-pass-rate nan")),
        ("histogram", "histogram has no file: give one"), ("histogram no.jsonl", "no.jsonl: there is no such file"),
        ("histogram scores.jsonl unmeasured.jsonl", "unmeasured.jsonl: problem b has no pass rate: measure first"),
        ("histogram scores.jsonl --out scores.jsonl", "--out scores.jsonl: give a name that ends in .png"),
        ("histogram scores.jsonl --out no/out.png", "--out no/out.png: there is no folder no: make it first"),
    ],
    "reward.py": [
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


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("pickled", "own_code"):
        for tokenizer in (folder / "model").glob("token*"):
            shutil.copy(tokenizer, folder / name)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.parametrize(("script", "arguments", "expected"),
                         [(script, *case) for script, cases in CASES.items() for case in cases])
def test_bad_input_ends_in_one_line(script, arguments, expected, world, monkeypatch, capfd):
    """`python SCRIPT ARGUMENTS`, in this process: importing torch again for each would take minutes."""
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)
    monkeypatch.setenv("XDG_CACHE_HOME", str(world.with_name("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", [script, *arguments.split()])
    before = content(world)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    shown = capfd.readouterr().err
    assert ended.value.code == 2, shown
    assert re.fullmatch(rf"{re.escape(Path(script).name)}: error: .*{re.escape(expected)}.*\n", shown), shown
    assert content(world) == before  # nothing was written


def test_nothing_of_a_data_file_is_evaluated(world, monkeypatch):
    """Problems and answers that are code in Python, in templates and in LaTeX."""
    from reward import grade

    trap = world / "trap"
    monkeypatch.chdir(world)
    for code in (f"__import__('os').mkdir('{trap}')", "{{ cycler.__init__.__globals__.os.mkdir('trap') }}",
                 "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
                 f"\\boxed{{__import__('os').mkdir('{trap}')}}", "\\input{/etc/passwd}",
                 "\\immediate\\write18{mkdir trap}"):
        assert grade(f"\\boxed{{{code}}}", code, require_think=False).reason in ("correct", "wrong", "invalid_gold")
        (world / "code.jsonl").write_text(json.dumps({"problem": code, "answer": "1"}) + "\n")
        tokenizer = data.toy_tokenizer()
        tokenizer.chat_template = None
        (problem,) = data.load_problems("code.jsonl")
        (problem,) = data.encode_prompts([problem], tokenizer, suffix="", max_prompt_tokens=1000)
        assert problem.text == code
    assert not trap.exists()
    (world / "code.jsonl").unlink()


@pytest.mark.parametrize("command", ["train.py --group-size 1", "tools/evaluate.py probe --temperatures 0:1:0.5",
                                     "tools/difficulty.py histogram no.jsonl", "reward.py no.jsonl"])
def test_bad_input_in_a_process_of_its_own(command, tmp_path):
    ended = subprocess.run([sys.executable, *f"{ROOT}/{command}".split()], capture_output=True, text=True, check=False,
                           cwd=tmp_path)
    assert ended.returncode == 2
    assert re.fullmatch(r"\w+\.py: error: .*: (give|check) .*\n", ended.stderr), ended.stderr


def test_models_are_loaded_from_pickled_weights_if_asked(world):
    from rollout import ModelError, load_model

    model = load_model(str(world / "model"), dtype=torch.float32, device=torch.device("cpu"))
    folder = world / "pickled"
    shutil.copy(world / "model" / "config.json", folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    settings = {"dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(ModelError, match="pickled"):
        load_model(str(folder), **settings)
    loaded = load_model(str(folder), **settings, allow_pickled_weights=True)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
