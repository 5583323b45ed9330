"""python -m page: who may ask the server, what it refuses, one dream at a time, and what is left behind: nothing. Then
the page in a headless Chromium, from a scene to two videos side by side.

In most tests a stand-in takes the place of sample.py: its seed says what it does.
"""

import contextlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_draw import PAGE, browser, needs_browser
from tqdm import tqdm

import page.studio
from clips import Motion
from page.server import DEMO, describe, open_server
from page.studio import BAR, LOCK, Busy, Job, Studio, own_folder, without_paths
from show import write_video

ROOT = Path(__file__).parent.parent
TAB, OTHER = "a" * 32, "b" * 32
DONE, FOREVER, FAILS = 0, 1, 2  # seeds
STAND_IN = """
import shutil, subprocess, sys, time
told = " ".join(sys.argv)
print("picture: 128x64; objects from ids.png; such pictures are strange to the model: indeed")
print("stage 1: motion:  50%|#####     | 2/4 [00:01<00:01,  2.00it/s]", end="\\r", file=sys.stderr, flush=True)
if "--seed=1 " in told:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    while True:
        pass
if "--seed=2 " in told:
    sys.exit("sample.py: picture: not a picture that Pillow can read")
shutil.copytree(TEMPLATE, "out")
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A command that copies what it wrote in place of sample.py."""
    folder = tmp_path_factory.mktemp("stand_in")
    out = folder / "out"
    out.mkdir()
    frames = np.full((16, 64, 128, 3), 40, np.uint8) + (10 * np.arange(16, dtype=np.uint8))[:, None, None, None]
    for name in ("flow", "segmentation", "depth", "video"):
        write_video(out / f"{name}.mp4", frames, 10)
    flow = torch.zeros(1, 16, 2, 64, 128)
    flow[0, 3, :, 5, 5] = torch.tensor([3.0, 4.0])
    Motion(flow, None, None).save(out / "motion.safetensors")
    Image.new("RGB", (512, 256)).save(out / "input.png")
    record = {"frames": 16, "fps": 10.0, "seconds": 1.5, "seed": 0, "steps": 25}
    (out / "run.json").write_text(json.dumps(record))
    script = folder / "stand_in.py"
    script.write_text(STAND_IN.replace("TEMPLATE", repr(str(out))))
    return (sys.executable, "-u", str(script))


@pytest.fixture
def server(tmp_path, stand_in):
    folder = tmp_path / "served"
    folder.mkdir()
    with open_server(Studio(folder, DEMO, stand_in), describe(DEMO)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        server.studio.close()
        assert list(folder.iterdir()) == []  # whatever the test did


def ask(server, method, path, body=None, **headers):
    """-> status, content. Names of headers have _ for -; None leaves a usual one out."""
    host = f"127.0.0.1:{server.server_port}"
    usual = {"Host": host} | ({"Origin": f"http://{host}"} if method == "POST" else {})
    told = {name: value for name, value in (usual | headers).items() if value is not None}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    for name, value in told.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None and "Transfer_Encoding" not in told:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    if body is not None:
        connection.send(body)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, content


def picture_of(ids=False):
    content = io.BytesIO()
    Image.new("L" if ids else "RGB", (128, 64), 1 if ids else "red").save(content, "PNG")
    return content.getvalue()


ARROWS = json.dumps({"arrows": [{"start": [5, 5], "end": [9, 5], "instance": 1}], "segmentation": "ids.png"})


def form(seed=DONE, without=(), **changed):
    """A multipart form, its content type."""
    parts = {"picture": picture_of(), "ids": picture_of(ids=True), "arrows": ARROWS, "samples": 1, "seed": seed}
    parts |= {"steps": 25} | changed
    body = b""
    for name, value in parts.items():
        if name not in without:
            file = '; filename="../../x.png"' if isinstance(value, bytes) else ""
            content = value if isinstance(value, bytes) else str(value).encode()
            body += f'--cut\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
    return body + b"--cut--\r\n", {"Content_Type": "multipart/form-data; boundary=cut"}


def dream(server, tab=TAB, **told):
    body, kind = form(**told)
    status, content = ask(server, "POST", f"/dream?tab={tab}", body, **kind)
    return status, json.loads(content) if status == 200 else content.decode()


def state(server, tab=TAB):
    return json.loads(ask(server, "GET", f"/state?tab={tab}")[1])["jobs"]


def waited(look, seconds=10):
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)
    return found


def finished(server, tab=TAB):
    return waited(lambda: (jobs := state(server, tab)) and jobs[-1]["state"] != "running" and jobs[-1])


def alive(group):
    """Processes of a group that compute: what only waits to be buried does not."""
    found = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if line.split()[0] == str(group) and "Z" not in line.split()[1]]


# --------------------------------------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", {"Host": "evil.example"}),
        ("GET", {"Host": "127.0.0.1"}),
        ("GET", {"Host": "127.0.0.1:1"}),
        ("GET", {"Host": None}),
        ("GET", {"Origin": "http://evil.example"}),
        ("GET", {"Origin": "null"}),
        ("GET", {"Sec_Fetch_Site": "cross-site"}),
        ("GET", {"Sec_Fetch_Site": "same-site"}),
        ("POST", {"Origin": None}),
        ("POST", {"Origin": "http://127.0.0.1:1"}),
        ("POST", {"Origin": "https://evil.example"}),
        ("POST", {"Host": "evil.example", "Origin": "http://evil.example"}),
    ],
)
def test_only_its_own_page_may_ask(server, method, headers):
    for path in ("/", "/info", f"/state?tab={TAB}", "/nowhere", "/scenes/demo/ids.png", f"/dream?tab={TAB}"):
        status, content = ask(server, method, path, b"" if method == "POST" else None, **headers)
        assert status == 403 and content.startswith(b"this server answers") and content.count(b"\n") == 1, path
    assert server.studio.seen == {}


def test_its_own_page_may_ask(server):
    for path in ("/", "/info", f"/state?tab={TAB}", "/scenes/demo/ids.png", "/scenes/driving/depth.png"):
        assert ask(server, "GET", path)[0] == 200
    port = server.server_port
    local = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}", "Sec_Fetch_Site": "same-origin"}
    assert ask(server, "POST", f"/bye?tab={TAB}", b"", **local)[0] == 200
    assert server.server_address[0] == "127.0.0.1"


# ----------------------------------------------------------------------------------------------------- what it refuses

PATHS = (
    "/../README.md",
    "/..%2fREADME.md",
    "/%2e%2e/%2e%2e/etc/passwd",
    "//etc/passwd",
    "/etc/passwd",
    "/page/server.py",
    "/scenes/../../README.md",
    "/scenes/demo/..%2f..%2fREADME.md",
    "/scenes/demo/arrows.json",
    "/scenes/..%2fdemo/ids.png",
    "/scenes/%2fetc/passwd",
    "/scenes/demo/%2fetc%2fpasswd",
    "/scenes/demo/ids.png%00",
    "/scenes/%ff/ids.png",
    f"/results/1/0/..%2f..%2farrows.json?tab={TAB}",
    f"/results/1/0/run.json?tab={TAB}",
    f"/results/1/0/%2fetc%2fpasswd?tab={TAB}",
    f"/results/1/7/video?tab={TAB}",
    f"/results/-1/0/video?tab={TAB}",
    f"/results/1/../0/video?tab={TAB}",
    f"/results/99999999999999999999/0/video?tab={TAB}",
    f"/results/1/0/video?tab={OTHER}",
    f"/results/1/zip?tab={OTHER}",
    "/results/1/zip?tab=../../../etc",
    "/results/1/zip",
    "/state?tab=/etc/passwd",
)


def test_no_path_of_a_request_is_opened(server, monkeypatch):
    assert dream(server)[0] == 200 and finished(server)["state"] == "done"
    assert ask(server, "GET", f"/results/1/0/video?tab={TAB}")[0] == 200
    opened = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or b"")
    for path in PATHS:
        status, content = ask(server, "GET", path)
        assert status in (400, 404) and content.count(b"\n") == 1 and len(content) < 200, path
    assert opened == []


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("arrows: not JSON", {"arrows": "{"}),
        ("arrows: not JSON", {"arrows": "[" * 100000}),
        ("arrows: expected", {"arrows": "[]"}),
        ("arrows: expected", {"arrows": '{"arrows": 3}'}),
        ("arrows: depth names a file", {"arrows": '{"arrows": [], "depth": "../../etc/passwd"}'}),
        ("arrows: depth names a file", {"arrows": '{"arrows": [], "depth": null}'}),
        ("arrows: segmentation names a file", {"arrows": '{"arrows": [], "segmentation": "/etc/passwd"}'}),
        ("arrows: a mask names a file", {"arrows": '{"arrows": [{"start": [1, 1], "end": [2, 2], "mask": "/etc/x"}]}'}),
        ("arrows without ids", {"without": ["ids"]}),
        ("picture: missing", {"without": ["picture"]}),
        ("picture: missing", {"picture": "a text"}),
        ("samples: expected a whole number from 1 to 8", {"samples": 9}),
        ("seed: expected", {"seed": -1}),
        ("seed: expected", {"seed": "0 --model /etc"}),
        ("steps: expected", {"steps": "²"}),
        ("steps: expected", {"without": ["steps"]}),
    ],
)
def test_a_bad_form_is_told_in_a_line(server, line, changed):
    status, told = dream(server, **changed)
    assert status == 400 and told.startswith(line) and told.count("\n") == 1
    assert list(server.studio.folder.iterdir()) == [] and server.studio.jobs == {}


def test_what_is_no_form_is_told_in_a_line(server):
    for body in (b"", b"--cut", b"nothing", form()[0][:300]):
        for kind in ("multipart/form-data; boundary=cut", "multipart/form-data", "application/json", "text/plain"):
            status, content = ask(server, "POST", f"/dream?tab={TAB}", body, Content_Type=kind)
            assert status == 400 and content.count(b"\n") == 1, (body, kind)
    assert ask(server, "POST", "/dream?tab=../x", b"")[0] == 400


def test_large_requests_are_told_in_a_line(server):
    for path in (f"/dream?tab={TAB}", "/nowhere"):
        status, content = ask(server, "POST", path, bytes(100 * 2**20))
        assert (status, content) == (413, b"100 MB is too large: 64 MB at most\n")
    status, content = ask(server, "POST", f"/dream?tab={TAB}", b"0\r\n\r\n", Transfer_Encoding="chunked")
    assert status == 411 and content.count(b"\n") == 1
    assert ask(server, "POST", f"/dream?tab={TAB}", None)[0] in (400, 411)


def test_a_client_that_says_nothing_stops_nobody(server):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.server_port)) as silent:
        silent.connect()
        assert ask(server, "GET", "/info")[0] == 200


def test_nothing_of_another_name_reaches_sample_py():
    assert json.loads(without_paths('{"arrows": [], "depth": "depth.png", "delta": 0.2}', False)) == {
        "arrows": [], "delta": 0.2,
    }  # fmt: skip
    assert json.loads(without_paths(ARROWS, True))["segmentation"] == "ids.png"


# ------------------------------------------------------------------------------------------------------------- a dream


def test_a_dream_from_the_form_to_the_zip(server):
    status, job = dream(server, seed=DONE)
    assert status == 200 and job["state"] == "running"
    job = finished(server)
    assert job["state"] == "done" and job["note"].endswith("strange to the model: indeed")
    assert job["progress"] == {"sample": 1, "stage": 1, "done": 2, "total": 4, "left": "00:01"}
    (result,) = job["results"]
    assert result["panels"] == ["flow", "segmentation", "depth", "video"] and result["rim"] == 5.0
    status, sheet = ask(server, "GET", f"/results/1/0/video?tab={TAB}")
    sheet = np.array(Image.open(io.BytesIO(sheet)).convert("L")).astype(int)
    assert status == 200 and sheet.shape == (4 * 64, 4 * 128)
    for frame in range(16):
        row, column = divmod(frame, 4)
        assert abs(sheet[64 * row + 32, 128 * column + 64] - 40 - 10 * frame) < 4
    assert ask(server, "GET", f"/results/1/0/input?tab={TAB}")[1].startswith(b"\x89PNG")
    names = zipfile.ZipFile(io.BytesIO(ask(server, "GET", f"/results/1/zip?tab={TAB}")[1])).namelist()
    wrote = {f"out/{name}" for name in ("motion.safetensors", "run.json", "input.png", "video.mp4", "flow.mp4")}
    assert wrote | {"picture", "arrows.json", "ids.png"} <= set(names) and not any(".." in name for name in names)
    assert state(server, OTHER) == [] and ask(server, "POST", f"/drop/1?tab={OTHER}", b"")[0] == 200
    assert len(state(server)) == 1
    assert ask(server, "POST", f"/drop/1?tab={TAB}", b"")[0] == 200 and state(server) == []
    assert list(server.studio.folder.iterdir()) == []


def test_one_dream_at_a_time_and_cancel_ends_all_of_it(server):
    assert dream(server, seed=FOREVER)[0] == 200
    group = server.studio.jobs[1].process.pid
    waited(lambda: len(alive(group)) == 2)  # it starts one, as sample.py starts ffmpeg
    for tab in (TAB, OTHER):
        status, told = dream(server, tab=tab)
        assert status == 409 and told.startswith("another dream is running") and told.count("\n") == 1
    assert ask(server, "GET", f"/results/1/0/video?tab={TAB}")[0] == 404
    assert ask(server, "GET", f"/results/1/zip?tab={TAB}")[0] == 404
    began = time.monotonic()
    assert ask(server, "POST", f"/drop/1?tab={TAB}", b"")[0] == 200
    waited(lambda: alive(group) == [], 2)
    assert time.monotonic() - began < 2
    assert list(server.studio.folder.iterdir()) == []
    assert dream(server, tab=OTHER)[0] == 200 and finished(server, OTHER)["state"] == "done"


def test_what_fails_is_told_and_leaves_nothing(server):
    dream(server, seed=FAILS)
    job = finished(server)
    assert (job["state"], job["error"]) == ("failed", "picture: not a picture that Pillow can read")
    assert list(server.studio.folder.iterdir()) == []
    assert dream(server)[0] == 200 and finished(server)["state"] == "done"


@pytest.mark.parametrize("how", ["it says bye", "it falls silent"])
def test_a_closed_tab_ends_its_dream(server, monkeypatch, how):
    dream(server, seed=FOREVER)
    group = server.studio.jobs[1].process.pid
    if how == "it says bye":
        assert ask(server, "POST", f"/bye?tab={TAB}", b"")[0] == 200
    else:
        monkeypatch.setattr(page.studio, "GONE", 0.1)
        waited(lambda: not server.studio.jobs, 3)
    waited(lambda: not alive(group) and list(server.studio.folder.iterdir()) == [], 2)
    assert TAB not in server.studio.seen


def test_few_dreams_are_kept(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(page.studio, "MOST_KEPT", 1)
    studio = Studio(tmp_path, DEMO, stand_in)
    job = studio.start(TAB, lambda folder: None, 1, ["--seed=0 "])
    waited(lambda: job.state == "done")
    with pytest.raises(Busy, match="1 dreams are kept"):
        studio.start(TAB, lambda folder: None, 1, ["--seed=0 "])
    with pytest.raises(ZeroDivisionError):
        studio.start(OTHER, lambda folder: 1 / 0, 1, [])
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    studio.close()
    assert list(tmp_path.iterdir()) == []


def test_bars_are_read_as_tqdm_writes_them():
    for title, sample in (("", None), ("2/3 sample_1, ", "2")):
        text = io.StringIO()
        for _ in tqdm(range(3), desc=f"{title}stage 1: motion", file=text, mininterval=0):
            pass
        bars = [BAR.search(line).groups() for line in text.getvalue().split("\r") if line.strip()]
        assert [bar[3] for bar in bars][:4] == ["0", "1", "2", "3"] and {bar[0] for bar in bars} == {sample}
        assert {(bar[2], bar[4]) for bar in bars} == {("1", "3")} and bars[0][5] == "?" and bars[-1][5] == "00:00"
    job = Job(1, TAB, Path("x"), 1, None)
    job.hear("sample.py: picture: not a picture")
    assert job.last and not job.note and not job.progress


# -------------------------------------------------------------------------------------------- the command, and its end


def start_command(folder, *arguments):
    command = [sys.executable, "-m", "page", "--no-browser", *arguments]
    environment = os.environ | {"TMPDIR": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def test_a_killed_server_takes_its_dream_along_and_the_next_cleans_up(tmp_path):
    server = start_command(tmp_path)
    server.server_port = int(server.stdout.readline().split("/")[2].split(":")[1])
    assert dream(server)[0] == 200  # sample.py itself, which has just begun
    (folder,) = (path for path in tmp_path.iterdir() if (path / LOCK).exists())
    found = subprocess.run(["ps", "--ppid", str(server.pid), "-o", "pid="], capture_output=True, text=True, check=True)
    (child,) = found.stdout.split()
    time.sleep(0.5)  # until its thread waits
    server.kill()
    server.wait()
    waited(lambda: alive(child) == [], 5)
    assert (folder / "1" / "picture").exists()
    second = start_command(tmp_path)
    second.stdout.readline()
    assert not folder.exists()
    third = start_command(tmp_path)  # beside a living one
    third.stdout.readline()
    assert len(list(tmp_path.glob("*/" + LOCK))) == 2
    for process in (second, third):
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert list(tmp_path.glob(page.studio.PREFIX + "*")) == []


def test_a_dream_that_prints_nothing_ends_with_its_server(tmp_path):
    (tmp_path / "sample.py").write_text("import time\ndef main(): print('here', flush=True), time.sleep(10)\n")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    with subprocess.Popen([sys.executable, "-m", "page.job"], cwd=tmp_path, **pipes) as job:
        assert job.stdout.readline() == b"here\n" and job.poll() is None
        job.stdin.close()
        assert job.wait(5) == 1


def test_folders_of_living_servers_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(page.studio.tempfile, "tempdir", str(tmp_path))
    with own_folder() as first:
        with own_folder() as second:
            assert first.exists() and second.exists()
        assert first.exists() and not second.exists()
    assert list(tmp_path.iterdir()) == []


def test_mistakes_on_the_command_line(tmp_path):
    for arguments, told in (
        (["--model", "nowhere"], "--model nowhere: expected a folder"),
        (["--port", "70000"], "port"),
    ):
        process = start_command(tmp_path, *arguments)
        out, error = process.communicate(timeout=20)
        assert process.returncode == 2 and told in error and error.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_page_learns_what_an_arrow_means_to_the_model(server, tmp_path):
    told = json.loads(ask(server, "GET", "/info")[1])
    config = json.loads((DEMO / "stage1" / "config.json").read_text())["stage"]
    assert told["model"] == {name: config[name] for name in ("frames", "width", "height", "told", "reduce")} | {
        "delta": json.loads((DEMO / "arrows.json").read_text())["delta"],
        "speeds": [2.5, 11],
    }
    assert told["scenes"][0] == "demo" and {"dominoes", "driving", "tower"} <= set(told["scenes"])
    for name in ("stage1", "stage2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"stage": {"frames": 14, "width": 512, "height": 320}}')
    assert describe(tmp_path)["delta"] is None and describe(tmp_path)["told"] is False


# ------------------------------------------------------------------------------------------------------------ the page


def says(page):
    return page.js("return $('dreamHelp').textContent")


def frame(page, card):
    """What the canvases of a card show now."""
    return page.js(
        "return [...document.querySelectorAll('.card')][arguments[0]] && "
        "[...document.querySelectorAll('.card')[arguments[0]].querySelectorAll('canvas')].map((c) => c.toDataURL())",
        card,
    )


@pytest.fixture(scope="module")
def chromium():
    with browser() as page:
        yield page


def open_page(page, server):
    page.js("unsaved = false")  # no question about what is drawn
    page.ask("POST", "/url", {"url": f"http://127.0.0.1:{server.server_port}/"})
    waited(lambda: page.js("return $('scene').options.length > 5"))


@pytest.fixture
def shown(server, chromium):
    """The server's page, in the browser."""
    open_page(chromium, server)
    yield chromium
    chromium.js("unsaved = false")
    chromium.ask("POST", "/url", {"url": PAGE.as_uri()})  # before its server ends


def open_scene(page, name):
    page.js("$('help').textContent = ''; $('scene').value = arguments[0]; $('scene').onchange()", name)
    waited(lambda: "drag an arrow" in page.status())


@needs_browser
def test_from_a_scene_to_two_videos_side_by_side(server, shown, monkeypatch):
    monkeypatch.setattr(server.studio, "command", (sys.executable, "-u", "-m", "page.job"))  # sample.py itself
    open_scene(shown, "dominoes")
    assert len(np.unique(shown.work()[0])) > 4 and "$" not in shown.js("return $('warnings').textContent")
    assert "Draw" in says(shown)
    shown.drag((28, 43), (62, 31))
    shown.js("$('steps').value = 1")
    shown.click("start")
    waited(lambda: shown.js("return $('start').hidden && !$('cancel').hidden"))
    waited(lambda: says(shown).startswith("Done") and frame(shown, 0), 60)
    job = server.studio.jobs[1]
    assert job.progress | {"left": ""} == {"sample": 1, "stage": 2, "done": 1, "total": 1, "left": ""}
    told = json.loads((job.folder / "arrows.json").read_text())
    assert told["delta"] == 0.2 and told["segmentation"] == "ids.png" and len(told["arrows"]) == 1
    record = json.loads((job.folder / "out" / "run.json").read_text())
    assert "depth.png" in record["inputs"] and record["steps"] == 1

    first = frame(shown, 0)
    waited(lambda: (now := frame(shown, 0)) and all(a != b for a, b in zip(now[2:], first[2:], strict=True)))
    assert frame(shown, 0)[1] == first[1]  # the arrows do not move
    shown.click("play")
    still = frame(shown, 0), shown.js("return $('time').value")
    time.sleep(0.3)
    assert still == (frame(shown, 0), shown.js("return $('time').value"))
    shown.slide("time", 15)
    assert frame(shown, 0) != still[0] and shown.js("return $('timeText').textContent") == "frame 16 of 16"

    monkeypatch.undo()  # the stand-in again
    shown.js("scrollTo(0, 0)")
    shown.drag((62, 31), (8, 50))
    shown.press(["\ue009", "\ue007"])  # Ctrl+Enter
    waited(lambda: frame(shown, 1))
    boxes = shown.js("return [...$('cards').children].map((c) => c.getBoundingClientRect()).map((r) => [r.x, r.y])")
    assert boxes[0][1] == boxes[1][1] and boxes[0][0] < boxes[1][0]
    again = json.loads((server.studio.jobs[2].folder / "arrows.json").read_text())["arrows"]
    assert again[0]["start"] == told["arrows"][0]["start"] and again[0]["end"] != told["arrows"][0]["end"]
    assert "strange to the model" in says(shown)

    shown.js("document.querySelector('.card a').click()")
    waited(lambda: (shown.downloads / "dream-1.zip").exists())
    names = zipfile.ZipFile(shown.downloads / "dream-1.zip").namelist()
    wrote = ["motion.safetensors", "run.json", "video.mp4", "flow.mp4", "segmentation.mp4", "depth.mp4", "grid.gif"]
    assert {f"out/{name}" for name in [*wrote, "input.png"]} | {"ids.png", "depth.png", "arrows.json"} <= set(names)
    shown.js("document.querySelector('.card button').click()")
    waited(lambda: shown.js("return $('cards').children.length") == 1)
    assert list(server.studio.jobs) == [2]


@needs_browser
def test_a_second_tab_waits_cancel_frees_and_a_closed_tab_leaves_nothing(server, shown):
    open_scene(shown, "demo")
    shown.js("$('seed').value = arguments[0]", FOREVER)
    shown.click("start")
    waited(lambda: "step 2 of 4, 00:01 left" in says(shown))
    assert shown.js("return [...$('far').querySelectorAll('progress')].map((p) => p.value)") == [0.5, 0]
    group = server.studio.jobs[1].process.pid

    first = shown.ask("GET", "/window")
    second = shown.ask("POST", "/window/new", {"type": "tab"})["handle"]
    shown.ask("POST", "/window", {"handle": second})
    shown.ask("POST", "/url", {"url": PAGE.as_uri()})
    open_page(shown, server)
    open_scene(shown, "roll")
    shown.click("start")
    waited(lambda: "another dream is running" in says(shown))
    assert shown.js("return !$('start').hidden && $('dreamHelp').className") == "error"

    shown.ask("POST", "/window", {"handle": first})
    began = time.monotonic()
    shown.click("cancel")
    waited(lambda: not alive(group), 2)
    waited(lambda: says(shown) == "Cancelled.")
    assert time.monotonic() - began < 2 and shown.js("return !$('start').hidden")

    shown.ask("POST", "/window", {"handle": second})
    shown.js("$('seed').value = arguments[0]", FAILS)
    shown.click("start")
    waited(lambda: "not a picture that Pillow can read" in says(shown))
    shown.js("$('seed').value = arguments[0]; unsaved = false", FOREVER)
    shown.click("start")
    group = waited(lambda: [job for job in server.studio.jobs.values() if job.state == "running"])[0].process.pid
    shown.ask("DELETE", "/window")
    waited(lambda: not alive(group), 3)
    shown.ask("POST", "/window", {"handle": first})
    waited(lambda: list(server.studio.folder.iterdir()) == [], 3)


@needs_browser
def test_the_page_warns_and_outlives_its_server(server, shown, tmp_path):
    warnings = lambda: shown.js("return $('warnings').innerText")  # noqa: E731
    open_scene(shown, "dominoes")
    assert warnings() == ""
    shown.drag((28, 43), (33, 43))
    assert "Arrow 3 is weak" in warnings() and "2.5 to 11 pixels a step" in warnings()
    shown.click("undo")
    shown.drag((28, 43), (100, 43))
    assert "is strong" in warnings()
    Image.new("RGB", (256, 128), "gray").save(tmp_path / "photo.png")
    shown.open(tmp_path / "photo.png")
    assert "No object is marked" in warnings()
    shown.press("x")
    shown.drag((20, 20), (60, 60))
    shown.press("a")
    shown.drag((30, 30), (80, 30))  # 50 pixels of the photo are 25 of the model's, 5 a step
    assert "Only what has an arrow is marked" in warnings() and "weak" not in warnings() and "strong" not in warnings()
    server.shutdown()
    server.server_close()
    shown.click("start")
    waited(lambda: "The server is gone" in says(shown))
    assert shown.js("return !$('start').hidden") and len(shown.work()[1]["arrows"]) == 1


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(server, shown, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    shown.ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
    open_scene(shown, "dominoes")
    for number in range(2):
        shown.click("start")
        waited(lambda: frame(shown, number))  # noqa: B023
    wide = shown.js("return [innerWidth, document.documentElement.scrollWidth, $('cards').scrollWidth]")
    right = shown.js("return [...document.querySelectorAll('.card *')].map((e) => e.getBoundingClientRect().right)")
    assert wide[0] == width and wide[1] <= width and max(right) <= width
    shown.ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.clearDeviceMetricsOverride", "params": {}})
