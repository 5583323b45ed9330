"""Training (or encoding) in other processes, forked from one that has everything loaded: a start costs no import.

    with Forks() as forks:
        forks.start([arguments of train.py] * 2)     # two processes that train together
        codes = forks.wait()

With SCRIPT=clips.encode in their environment, the command lines are that script's. With WATCH=DIR, they write weights
and averages, whole, to DIR: before their first step and after every second one. With SHOWN=SECONDS, a file that another
process wrote is awaited as long.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Forks:
    def __enter__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(paths)}
        self.server = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_):
        self.server.stdin.close()  # which a worker that reads clips may still hold open
        self.server.terminate()
        self.server.wait()

    def start(self, commands, folder, places=None, **environment):
        """A process for each command line; what it says goes to FOLDER/RANK.out and .err. -> their ids"""
        told, count, port = [], len(commands), free_port()
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for rank, words in enumerate(commands):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            names |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port} | environment
            place = str(places[rank] if places else ROOT)
            told.append(({name: str(value) for name, value in names.items()}, place, list(map(str, words))))
        self.say([told, str(self.folder)])
        return self.heard()

    def wait(self):
        self.say(None)
        return self.heard()

    def run(self, commands, folder, **environment):
        self.start(commands, folder, **environment)
        return self.wait()

    def errors(self, rank=0):
        return (self.folder / f"{rank}.err").read_text()

    def say(self, what):
        self.server.stdin.write(json.dumps(what) + "\n")
        self.server.stdin.flush()

    def heard(self):
        return json.loads(self.server.stdout.readline())


def watch(train, folder):
    take_step, begun = train.take_step, []

    def whole(values):
        values = {name: value.detach() for name, value in values.items()}
        return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for name, v in values.items()}

    def state(learner):
        average = dict(learner.average.model().named_parameters())
        return {"weights": whole(dict(learner.core.named_parameters())), "average": whole(average)}

    def write(machine, learner, **more):
        if not os.path.exists(file := f"{folder}/rank_{machine.rank}_step_{learner.step}.pt"):
            torch.save(state(learner) | more, file)

    def watched(arguments, machine, task, learner, batches):
        if not begun:
            held = [own.to_local() if hasattr(own, "to_local") else own for own in learner.tensors().values()]
            begun.append(write(machine, learner, held=sum(part.nbytes for part in held)))
        record = take_step(arguments, machine, task, learner, batches)
        if learner.step % 2 == 0:
            write(machine, learner, **record)
        return record

    train.take_step = watched


def child(environment, place, words, folder):
    os.environ.update(environment)
    os.chdir(place)
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{environment['RANK']}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    import tiny

    import train
    import training.processes

    train.PRESETS["tiny"] = tiny.TINY
    if "SHOWN" in environment:
        training.processes.check_shared.__defaults__ = (float(environment["SHOWN"]),)
    if "WATCH" in environment:
        watch(train, environment["WATCH"])
    script = environment.get("SCRIPT", "train")
    sys.argv = [script, *words]
    importlib.import_module(script).main()


def serve():
    import tiny  # noqa: F401
    import torch._dynamo  # noqa: F401 (the optimiser wants it)

    import clips.encode  # noqa: F401
    import train  # noqa: F401

    torch.set_num_threads(1)
    pids = []
    for line in sys.stdin:
        told = json.loads(line)
        if told is None:
            print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
            continue
        pids = []
        for process in told[0]:
            pid = os.fork()
            if pid == 0:
                child(*process, told[1])
                sys.exit()
            pids.append(pid)
        print(json.dumps(pids), flush=True)


if __name__ == "__main__":
    serve()
