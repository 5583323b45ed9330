"""python -m page: who may ask the server, what it refuses, one dream at a time, and what is left behind: nothing; a
motion edited between the stages. Then the page in a headless Chromium, from a scene to two videos side by side, and to
a third, painted again.

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
from page.edit import MOST_MOVES, RANGES, RIM, Edit, Move, fill, flip_flow, move_object, read_edit
from page.server import DEMO, describe, open_server
from page.studio import BAR, LOCK, Busy, Job, Studio, own_folder, without_paths
from show import write_video

ROOT = Path(__file__).parent.parent
TAB, OTHER = "a" * 32, "b" * 32
DONE, FOREVER, FAILS, ESTIMATES = 0, 1, 2, 3  # seeds
STAND_IN = """
import shutil, subprocess, sys, time
told = " ".join(sys.argv)
depth = "depth by some/model" if "--seed=3 " in told else "no depth"
depth = "depth from depth.png" if "--depth depth.png" in told else depth
print(f"picture: 128x64; objects from ids.png; {depth}; such pictures are strange to the model: indeed")
print("stage 1: motion:  50%|#####     | 2/4 [00:01<00:01,  2.00it/s]", end="\\r", file=sys.stderr, flush=True)
if "--seed=1 " in told:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    while True:
        pass
if "--seed=2 " in told:
    sys.exit("sample.py: picture: not a picture that Pillow can read")
given = shutil.ignore_patterns("motion*") if "--stage=2 " in told else None
shutil.copytree(TEMPLATE, "out", ignore=given, dirs_exist_ok=given is not None)
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
    ids = torch.zeros(1, 16, 64, 128, dtype=torch.long)
    ids[:, :, 20:40, 50:60] = 7
    Motion(flow, ids, torch.full((1, 16, 64, 128), 9.0)).save(out / "motion.safetensors")
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
    for path in (
        "/",
        "/info",
        f"/state?tab={TAB}",
        "/nowhere",
        "/scenes/demo/ids.png",
        f"/dream?tab={TAB}",
        f"/paint/1/0?tab={TAB}",
    ):
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
    studio.drop(TAB)
    for _ in range(2):  # what has failed is not kept, and takes no place
        failed = studio.start(TAB, lambda folder: None, 1, [f"--seed={FAILS} "])
        waited(lambda failed=failed: failed.state == "failed")
    job = studio.start(TAB, lambda folder: None, 1, ["--seed=0 "])
    waited(lambda: job.state == "done")
    assert [path.name for path in tmp_path.iterdir()] == ["5"]
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


# ----------------------------------------------------------------------------------------- an edit between the stages


def random_motion(seed, frames=4, height=17, width=23):
    """Objects 1 to 3 in lumps, some rows and a frame without any background."""
    rng = np.random.default_rng(seed)
    ids = rng.choice([0, 0, 0, 1, 2, 3], (1, frames, -(-height // 4), -(-width // 4))).repeat(4, 2).repeat(4, 3)
    ids = ids[:, :, :height, :width].copy()
    ids[:, -1][ids[:, -1] == 0] = 1
    ids[:, :, 2:5][ids[:, :, 2:5] == 0] = 3
    flow, depth = rng.normal(size=(1, frames, 2, height, width)), rng.uniform(1, 9, (1, frames, height, width))
    return {"flow": flow.astype(np.float32), "segmentation": ids, "depth": depth.astype(np.float32)}


def behind(values, known, y, x):
    """What the background leads one to expect at a pixel of [H][W], pixel by pixel; None where there is none."""
    rows = sorted((row for row in range(len(values)) if any(known[row])), key=lambda row: (abs(row - y), row))
    if not rows:
        return None
    row = rows[0]
    left = [column for column in range(x + 1) if known[row][column]][-1:]
    right = [column for column in range(x, len(values[row])) if known[row][column]][:1]
    if not (left and right) or left == right:
        return values[row][(left or right)[0]]
    (a,), (b,) = left, right
    return (values[row][a] * (b - x) + values[row][b] * (x - a)) / (b - a)


def moved_by_loops(motion, number, frame, dx, dy):
    ids, edited = motion["segmentation"][0], {name: value.copy() for name, value in motion.items()}
    _, height, width = ids.shape
    layers = {"depth": [motion["depth"][0]], "flow": list(np.moveaxis(motion["flow"][0], 1, 0))}
    new = {"depth": [edited["depth"][0]], "flow": list(np.moveaxis(edited["flow"][0], 1, 0))}
    places = [(y, x) for y in range(height) for x in range(width)]
    for t in range(frame, len(ids)):
        own = [(y, x) for y, x in places if ids[t, y, x] == number]
        by = [
            (y, x)
            for y, x in places
            if ids[t, y, x] == 0 and min([abs(y - b) + abs(x - a) for b, a in own], default=9) <= RIM
        ]
        known = ids[t] == 0
        for y, x in by:
            known[y, x] = False
        for y, x in own:
            edited["segmentation"][0, t, y, x] = 0
        for y, x in own + by:
            for name, channel in [("depth", 0), ("flow", 0), ("flow", 1)]:
                if (value := behind(layers[name][channel][t], known, y, x)) is not None:
                    new[name][channel][t, y, x] = value
        for y, x in own:
            if 0 <= y + dy < height and 0 <= x + dx < width:
                edited["segmentation"][0, t, y + dy, x + dx] = number
                for name, channel in [("depth", 0), ("flow", 0), ("flow", 1)]:
                    new[name][channel][t, y + dy, x + dx] = layers[name][channel][t, y, x]
    for y, x in places:
        if ids[frame - 1, y, x] == number:
            edited["flow"][0, frame - 1, :, y, x] += (dx, dy)
    return edited


MOVES = [
    (1, 1, 3, -2),
    (2, 3, -1, 0),
    (3, 2, 0, 5),
    (3, 1, 0, 0),
    (1, 2, -20, 9),
    (2, 1, 30, 0),
    (3, 1, -30, -20),
    (2, 2, 99, -99),
]


@pytest.mark.parametrize("move", MOVES)
def test_an_object_moves_as_a_loop_over_pixels_moves_it(move):
    motion = random_motion(move[1])
    before = {name: value.copy() for name, value in motion.items()}
    moved, expected = move_object(motion, *move), moved_by_loops(motion, *move)
    for name, value in expected.items():
        np.testing.assert_allclose(moved[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert moved[name].dtype == motion[name].dtype and (motion[name] == before[name]).all(), name
    parts = {name: value for name, value in motion.items() if name == "segmentation"}
    assert (move_object(parts, *move)["segmentation"] == moved["segmentation"]).all()  # flow and depth may be missing


def test_what_a_moved_object_leaves_is_background_as_beside_it():
    """A floor whose depth and flow are the same along a row has no seam."""
    floor = np.repeat(np.linspace(9, 2, 8, dtype=np.float32)[:, None], 13, axis=1)
    holes, depth = np.zeros((8, 13), bool), floor.copy()
    holes[2:6, 4:7] = True
    depth[holes] = 1
    fill(depth[None], holes[None], ~holes[None])
    assert (depth == floor).all()


def test_a_flipped_flow_changes_nothing_else():
    motion = random_motion(0)
    flipped = flip_flow(motion)
    assert (flipped["flow"] == -motion["flow"]).all() and motion["flow"].any()
    assert all(flipped[name] is motion[name] for name in ("segmentation", "depth"))
    assert (flip_flow(flipped)["flow"] == motion["flow"]).all()


@pytest.mark.parametrize(
    ("move", "told"),
    [
        ((1, 0, 1, 1), "frame 0: expected 1 to 3"),
        ((1, 4, 1, 1), "frame 4: expected 1 to 3"),
        ((9, 2, 1, 1), "object 9 is in no frame from 2 on"),
    ],
)
def test_a_move_that_does_not_fit_is_told(move, told):
    fine = Move(1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"^edit: move 2: {told}$"):
        Edit([fine, Move(*move)], False).apply(random_motion(1))


def test_what_is_moved_out_of_the_picture_is_gone():
    out, back = Move(1, 1, 99, 0), Move(1, 1, -99, 0)
    with pytest.raises(ValueError, match="^edit: move 2: object 1 is in no frame"):
        Edit([out, back], False).apply(random_motion(1))
    for parts, told in (({}, "move 1: the motion has no ids"), ({"segmentation": 1}, "flip: the motion has no flow")):
        with pytest.raises(ValueError, match=f"^edit: {told}$"):
            Edit([] if parts else [out], True).apply(parts)


def test_an_edit_is_moves_one_after_the_other_and_the_flip():
    edit, motion = Edit([Move(1, 1, 2, 1), Move(2, 2, -1, 0)], True), random_motion(3)
    assert read_edit(edit.to_json().encode()) == edit
    expected = flip_flow(move_object(move_object(motion, 1, 1, 2, 1), 2, 2, -1, 0))
    assert all((value == expected[name]).all() for name, value in edit.apply(motion).items())
    assert (
        edit.told() == "object 1 moved by 2, 1 from frame 2 on; object 2 moved by -1, 0 from frame 3 on; flow flipped"
    )


MOVE = {"object": 7, "frame": 5, "dx": 12, "dy": -4}


def edited(server, edit, number=1, sample=0, tab=TAB, **headers):
    """Asks for a dream to be painted again; `edit` is JSON's bytes, or what becomes JSON."""
    body = edit if isinstance(edit, bytes) else json.dumps(edit).encode()
    status, content = ask(server, "POST", f"/paint/{number}/{sample}?tab={tab}", body, **headers)
    return status, json.loads(content) if status == 200 else content.decode()


def test_a_dream_is_painted_again_from_an_edited_motion(server):
    dream(server, depth=picture_of(ids=True), samples=1)
    finished(server)
    sheet = np.array(Image.open(io.BytesIO(ask(server, "GET", f"/results/1/0/ids?tab={TAB}")[1])))
    assert sheet.shape == (4 * 64, 4 * 128) and set(np.unique(sheet)) == {0, 7}
    assert (sheet[64 * 3 + 20 : 64 * 3 + 40, 128 * 2 + 50 : 128 * 2 + 60] == 7).all() and (sheet == 7).sum() == 16 * 200

    server.studio.jobs[1].results[0] |= {"seed": 40, "steps": 9}
    status, job = edited(server, {"moves": [MOVE], "flip": True})
    assert status == 200 and job["made"] == "Dream 1: object 7 moved by 12, -4 from frame 6 on; flow flipped"
    job = finished(server)
    assert (job["number"], job["state"], job["results"][0]["rim"]) == (2, "done", pytest.approx(160**0.5))  # the jump
    told = server.studio.jobs[2].process.args
    assert {"--seed=40", "--steps=9", "--stage=2"} <= set(told) and told[told.index("--depth") + 1] == "depth.png"
    files = [{path.name: path.read_bytes() for path in server.studio.jobs[i].folder.glob("*.*")} for i in (1, 2)]
    assert all(files[1].pop(name) == content for name, content in files[0].items()) and len(files[0]) == 3
    assert [*files[1]] == ["edit.json"] and json.loads(files[1]["edit.json"]) == {"moves": [MOVE], "flip": True}
    first, second = (Motion.load(server.studio.jobs[i].folder / "out" / "motion.safetensors") for i in (1, 2))
    assert (second.segmentation[0, 5:, 16:36, 62:72] == 7).all() and (second.segmentation == 7).sum() == 16 * 200
    assert torch.equal(first.segmentation[:, :5], second.segmentation[:, :5])
    assert torch.equal(first.flow[:, :4], -second.flow[:, :4])

    status, job = edited(server, {"moves": [], "flip": True}, number=2)  # of what is edited, too
    assert status == 200 and job["made"] == "Dream 2: flow flipped" and finished(server)["state"] == "done"


def test_a_painting_counts_as_a_dream(server, monkeypatch):
    fine = {"moves": [MOVE], "flip": False}
    dream(server, samples=1)
    finished(server)
    server.studio.jobs[1].results[0]["seed"] = FOREVER
    assert edited(server, fine)[0] == 200
    group = server.studio.jobs[2].process.pid
    assert edited(server, fine) == (409, waited(lambda: dream(server)[1]))  # another is running
    assert edited(server, fine, number=2)[0] == 404  # not done
    assert ask(server, "POST", f"/drop/2?tab={TAB}", b"")[0] == 200
    waited(lambda: alive(group) == [], 2)
    monkeypatch.setattr(page.studio, "MOST_KEPT", 1)
    assert edited(server, fine) == (409, "1 dreams are kept already: remove one\n")
    assert [path.name for path in server.studio.folder.iterdir()] == ["1"]


@pytest.mark.parametrize("before", [True, False])
def test_a_dream_that_is_removed_meanwhile_is_not_painted(server, monkeypatch, before):
    """Before its motion is read, or after."""
    dream(server)
    finished(server)
    read = page.studio.load_file

    def read_while_it_is_removed(path):
        motion = None if before else read(path)
        server.studio.drop(TAB, 1)
        return motion or read(path)

    monkeypatch.setattr(page.studio, "load_file", read_while_it_is_removed)
    status, told = edited(server, {"moves": [MOVE], "flip": False})
    assert status == 404 and told.startswith("dream 1 ") and [*server.studio.folder.iterdir()] == []


def with_move(**changed):
    return {"moves": [MOVE | changed], "flip": False}


BAD_EDITS = [
    ("not JSON", b""),
    ("not JSON", b"{"),
    ("not JSON", b"\xff"),
    ("not JSON", b"[" * 60000),
    ("not JSON", b'{"moves": [], "flip": ' + b"9" * 5000 + b"}"),
    ("expected {", []),
    ("expected {", {"moves": [MOVE]}),
    ("expected {", {"moves": [MOVE], "flip": False, "out": "/etc"}),
    ("flip: expected", {"moves": [MOVE], "flip": 1}),
    ("moves: expected", {"moves": MOVE, "flip": False}),
    ("moves: expected", {"moves": [MOVE] * (MOST_MOVES + 1), "flip": False}),
    ("nothing is changed", {"moves": [], "flip": False}),
    ("move 2: expected object, frame, dx, dy", {"moves": [MOVE, 3], "flip": False}),
    ("move 1: expected object, frame, dx, dy", with_move(path="x")),
    ("move 1: dx: expected a whole number", with_move(dx=float("nan"))),
    ("move 1: dy: expected a whole number", with_move(dy=float("inf"))),
    ("move 1: dx: expected a whole number", with_move(dx=1.0)),
    ("move 1: dx: expected a whole number", with_move(dx=10**400)),
    ("move 1: dy: expected a whole number", with_move(dy=-10000)),
    ("move 1: object: expected a whole number", with_move(object=True)),
    ("move 1: object: expected a whole number", with_move(object="7")),
    ("move 1: object: expected a whole number", with_move(object=256)),
    ("move 1: frame: expected a whole number", with_move(frame=0)),
    ("move 1: frame: expected a whole number", with_move(frame=None)),
    ("move 1: frame 16: expected 1 to 15", with_move(frame=16)),
    ("move 1: object 8 is in no frame from 5 on", with_move(object=8)),
]


def test_a_bad_edit_is_told_in_a_line_and_leaves_nothing(server):
    dream(server)
    finished(server)
    for line, edit in BAD_EDITS:
        status, told = edited(server, edit)
        assert status == 400 and told.startswith(f"edit: {line}") and told.count("\n") == 1 and len(told) < 200, edit
    for name, (least, most) in RANGES.items():
        assert read_edit(json.dumps(with_move(**{name: most})).encode()).moves[0] != Move(**MOVE)
        assert f"from {least} to {most}" in edited(server, with_move(**{name: most + 1}))[1]
    fine = {"moves": [MOVE], "flip": False}
    for place in ({"number": 2}, {"sample": 1}, {"sample": -1}, {"number": 10**30}, {"tab": OTHER}):
        status, told = edited(server, fine, **place)
        assert status == 404 and told.count("\n") == 1, place
    assert edited(server, fine, tab="../x")[0] == 400
    assert edited(server, fine, Origin="http://evil.example")[0] == edited(server, fine, Origin=None)[0] == 403
    assert edited(server, b" " * 2**16 + json.dumps(fine).encode()) == (413, "edit: is too large: 64 kB at most\n")
    assert ask(server, "GET", f"/results/1/0/ids?tab={OTHER}")[0] == 404
    assert ask(server, "GET", f"/results/1/-1/ids?tab={TAB}")[0] == 404
    assert [*server.studio.jobs] == [1] and [path.name for path in server.studio.folder.iterdir()] == ["1"]


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


def edit_of(page, card, part, click=False):
    """The text of a part of a card's edit, which stands there when it is open."""
    line = "const e = document.querySelectorAll('.card')[arguments[0]].querySelector(arguments[1])"
    what = "e.click()" if click else "return e?.textContent"
    return page.js(f"{line}; {what}", card, f".edit:not([hidden]) {part}")


def drag_object(page, card, *cells, kind="mouse"):
    """In the ids of a card, which are 128x64."""
    line = "const e = document.querySelectorAll('.card')[arguments[0]].querySelector('.segmentation canvas')"
    box = page.js(f"{line}; e.scrollIntoView({{block: 'center'}}); return e.getBoundingClientRect().toJSON()", card)
    places = [(box["x"] + (x + 0.5) * box["width"] / 128, box["y"] + (y + 0.5) * box["height"] / 64) for x, y in cells]
    moves = [{"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)} for x, y in places]
    actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
    pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions}
    page.ask("POST", "/actions", {"actions": [pointer]})


def objects_shown(page, card):
    """Left, top, right, bottom of what is not black in the ids of a card, and how many pixels of it there are."""
    line = "const c = document.querySelectorAll('.card')[arguments[0]].querySelector('.segmentation canvas')"
    data = "c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
    found = page.js(
        f"{line}, d = {data}; return [...d.keys()].filter((i) => i % 4 === 0 && d[i]).map((i) => i / 4)", card
    )
    y, x = np.divmod(found, 128)
    return x.min(), y.min(), x.max() + 1, y.max() + 1, len(found)


def edit_and_paint_again(server, page):
    """The card of a stand-in, whose ids show an object in x 50 to 60, y 20 to 40."""
    page.js("document.querySelectorAll('.card .open')[1].click()")
    waited(lambda: edit_of(page, 1, "p"))
    assert "Drag an object in the ids" in edit_of(page, 1, "p") and page.js("return $('play').textContent") == "Play"
    page.slide("time", 0)
    drag_object(page, 1, (55, 30), (60, 30))
    assert "The first frame is the picture" in edit_of(page, 1, "p") and "Paint" in edit_of(page, 1, ".paint:disabled")
    page.slide("time", 5)
    drag_object(page, 1, (20, 30), (40, 30))  # background
    assert edit_of(page, 1, ".back:enabled") is None and objects_shown(page, 1) == (50, 20, 60, 40, 200)
    drag_object(page, 1, (55, 30), (57, 31), (75, 60))
    drag_object(page, 1, (75, 60), (67, 26), kind="touch")
    assert edit_of(page, 1, "p") == "Changed: object 7 by 12, -4 from frame 6 on." and objects_shown(page, 1) == (
        62,
        16,
        72,
        36,
        200,
    )
    page.slide("time", 4)
    assert objects_shown(page, 1) == (50, 20, 60, 40, 200)
    page.slide("time", 6)
    drag_object(page, 1, (67, 26), (127, 26))
    assert objects_shown(page, 1) == (122, 16, 128, 36, 120)
    edit_of(page, 1, ".back", click=True)
    assert objects_shown(page, 1) == (62, 16, 72, 36, 200)
    edit_of(page, 1, ".flip", click=True)
    assert "flow flipped, while ids and depth stay" in edit_of(page, 1, "p")
    edit_of(page, 1, ".paint", click=True)
    waited(lambda: frame(page, 2))
    told = page.js("return document.querySelectorAll('.card')[2].querySelector('.made').textContent")
    assert told == "Dream 2: object 7 moved by 12, -4 from frame 6 on; flow flipped"
    assert edit_of(page, 1, "p") is None and objects_shown(page, 1)[-1] > 8000  # as it was
    second, third = (server.studio.jobs[number].folder for number in (2, 3))
    assert json.loads((third / "edit.json").read_text()) == {"moves": [MOVE], "flip": True}
    moved = Motion.load(third / "out" / "motion.safetensors").segmentation
    assert not torch.equal(moved, Motion.load(second / "out" / "motion.safetensors").segmentation)


@needs_browser
def test_from_a_scene_to_two_videos_side_by_side_and_one_painted_again(server, shown, monkeypatch):
    monkeypatch.setattr(server.studio, "command", (sys.executable, "-u", "-m", "page.job"))  # sample.py itself
    open_scene(shown, "dominoes")
    assert len(np.unique(shown.work()[0])) > 4 and "$" not in shown.js("return $('warnings').textContent")
    assert "Draw" in says(shown)
    shown.drag((28, 43), (62, 31))
    shown.js("$('steps').value = 1")
    shown.click("start")
    waited(lambda: shown.js("return $('start').hidden && !$('cancel').hidden"))
    waited(lambda: says(shown).startswith("Done") and frame(shown, 0), 120)
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
    doubts = shown.js("return [...document.querySelectorAll('.doubt')].map((e) => [e.hidden, e.textContent])")
    assert doubts[0] == [True, ""] and "strange" in doubts[1][1] and "depth" not in doubts[1][1].lower()
    edit_and_paint_again(server, shown)

    shown.js("document.querySelector('.card a').click()")
    waited(lambda: zipfile.is_zipfile(shown.downloads / "dream-1.zip"))  # there, and whole
    names = zipfile.ZipFile(shown.downloads / "dream-1.zip").namelist()
    wrote = ["motion.safetensors", "run.json", "video.mp4", "flow.mp4", "segmentation.mp4", "depth.mp4", "grid.gif"]
    assert {f"out/{name}" for name in [*wrote, "input.png"]} | {"ids.png", "depth.png", "arrows.json"} <= set(names)
    shown.js("document.querySelector('.card .remove').click()")
    waited(lambda: shown.js("return $('cards').children.length") == 2)
    assert list(server.studio.jobs) == [2, 3]


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
def test_nothing_is_wider_than_the_window(server, shown, tmp_path, width):
    """Of a photo without depth, which is told."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    shown.ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
    Image.new("RGB", (256, 128), "gray").save(tmp_path / "photo.png")
    shown.open(tmp_path / "photo.png")
    for number, seed in enumerate((DONE, ESTIMATES)):
        shown.js("$('seed').value = arguments[0]", seed)
        shown.click("start")
        waited(lambda: frame(shown, number))  # noqa: B023
    shown.js("document.querySelector('.card .open').click()")
    waited(lambda: edit_of(shown, 0, "p"))
    doubts = shown.js("return [...document.querySelectorAll('.doubt')].map((e) => e.innerText)")
    assert (
        "No depth came with the picture" in doubts[0]
        and "depth of the picture was estimated by some/model." in doubts[1]
    )
    wide = shown.js("return [innerWidth, document.documentElement.scrollWidth, $('cards').scrollWidth]")
    right = shown.js("return [...document.querySelectorAll('.card *')].map((e) => e.getBoundingClientRect().right)")
    assert wide[0] == width and wide[1] <= width and max(right) <= width

    edit_of(shown, 0, ".flip", click=True)
    assert edit_of(shown, 0, ".paint:enabled")
    shown.js("$('seed').value = arguments[0]", FOREVER)
    shown.click("start")
    waited(lambda: edit_of(shown, 0, ".paint:disabled") and shown.js("return !$('cancel').hidden"))
    shown.click("cancel")
    waited(lambda: edit_of(shown, 0, ".paint:enabled"))
    shown.ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.clearDeviceMetricsOverride", "params": {}})
