"""Models for tests: a random Qwen2 of 30,000 parameters with the tiny world's tokenizer. Nothing is downloaded.

PRM_TEST_DEVICE=cuda puts the models of test_policy, test_prm_model, test_search and test_train on the GPU, and what
these tests start, in fp32. Without it no test sees a GPU."""
import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
from concurrent.futures import Future
from itertools import chain
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the scripts that tests start: threads that share a core only spin
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # train.py allows TF32, 10 bits of mantissa: here fp32 is fp32

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = str(ROOT)  # also of the forks' server, which has no sys.path of ours
TINY = ROOT / "tiny"
DEVICE = os.environ.get("PRM_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor do the scripts that tests start
torch.set_num_threads(1)
two_devices = pytest.mark.skipif(DEVICE != "cpu" and torch.cuda.device_count() < 2, reason="needs two GPUs")


def random_qwen(seed=0, layers=2, hidden=32, **keywords):
    """Large random weights: next-token distributions are far from uniform, and differences show."""
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=512, hidden_size=hidden, intermediate_size=64, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                         tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
                         initializer_range=0.3, step_separator="\n", **keywords)
    return Qwen2ForCausalLM(config).to(DEVICE).eval()


# ---------------------------------------------------------------- other processes, and ranks

FOLDER = tempfile.TemporaryDirectory(prefix="prm-")  # of what other processes leave
# forked from one that has imported everything: to import torch and transformers takes each script five seconds
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["annotate", "beyond.reinforce", "evaluate", "search", "similarity", "train"])


def begin(function, *args, ranks=1, output=os.devnull):
    """function(*args) in a process for each rank, with what torchrun puts into its environment -> the processes.
    output: the file that they print to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKS.Process(target=_rank, args=(rank, ranks, port, function, args, output), daemon=True)
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def run_ranks(function, *args, ranks=2):
    """The same, to its end -> what they have printed."""
    output = Path(tempfile.mkstemp(dir=FOLDER.name)[1])
    processes = begin(function, *args, ranks=ranks, output=output)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks, output.read_text()
    return output.read_text()


def _rank(rank, ranks, port, function, args, output):
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(output, "a", buffering=1)
    for number in (1, 2):  # of the processes that it starts
        os.dup2(sys.stdout.fileno(), number)
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- what takes long runs beside the other tests

AHEAD = {}  # name of a fixture -> (its job, its Future)
ENVIRONMENT = dict(os.environ)  # before any test changes it


def ahead(job):
    """A fixture of what job(folder) returns. The job begins once the tests have been collected, in a thread that only
    waits for processes: so these use the second core while the tests before its own use the first."""
    AHEAD[job.__name__] = job, Future()

    @pytest.fixture(scope="session", name=job.__name__)
    def result():
        return AHEAD[job.__name__][1].result()
    return result


def pytest_collection_modifyitems(items):
    """The tests that wait for such a job come last."""
    items.sort(key=lambda item: not AHEAD.keys().isdisjoint(item.fixturenames))


def pytest_collection_finish(session):
    wanted = set(chain.from_iterable(item.fixturenames for item in session.items))
    names = [name for name in AHEAD if name in wanted]  # in the order of the files
    if not session.config.option.collectonly:
        threading.Thread(target=_work, args=(names,), daemon=True).start()


def _work(names):
    for name in names:
        job, future = AHEAD[name]
        folder = Path(FOLDER.name, name)
        folder.mkdir()
        try:
            future.set_result(job(folder))
        except BaseException as error:  # of the tests that ask for it
            future.set_exception(error)


def printed(script, flags, folder):
    """What `python script.py flags` prints, in a folder that has the shipped models."""
    folder.mkdir(exist_ok=True)
    return run_ranks(_main, script, flags, folder, ranks=1)


def _main(script, flags, folder):
    os.chdir(folder)
    Path("tiny").symlink_to(TINY)
    importlib.import_module(script).main(flags)


# ---------------------------------------------------------------- models

@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "A")


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory, tokenizer):
    """A random LM as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("lm")
    random_qwen().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
