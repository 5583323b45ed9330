"""The drawing page with a Dream button, for this computer alone.

    python -m page [--model DIR] [--port N] [--no-browser]

Who may ask: pages that this server gave. A request with another Host or Origin gets 403, so that no other site that the
browser has open can use it. What a request names is looked up in tables and never becomes a path; what it sends gets
names of ours. Every refusal is one line of text.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import threading
import webbrowser
from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from bottle import Bottle, HTTPError, HTTPResponse, abort, request, response

from page.edit import read_edit
from page.studio import ROOT, Busy, Job, Studio, frames_of, ids_of, own_folder, sheet_of, without_paths
from sources import expand_home

DEMO = ROOT / "demo"
LARGEST = 64 * 2**20  # bytes of a request
LARGEST_EDIT = 2**16
DRAINED = 4 * LARGEST  # read and thrown away, so that the browser hears why and not that the line broke
LIMITS = {"samples": (1, 8), "seed": (0, 2**31 - 1), "steps": (1, 200)}
PARTS = {"picture": "picture", "ids": "ids.png", "depth": "depth.png"}  # field -> our name
HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def describe(model: Path) -> dict:
    """What the page must know of a model, of its config files and its page.json (delta: that of arrows without one;
    speeds: least and most of its training, pixels a frame step). Raises ValueError of one line."""
    try:
        configs = [json.loads((model / name / "config.json").read_text())["stage"] for name in ("stage1", "stage2")]
        own = model / "page.json"
        told = {"delta": None, "speeds": None} | (json.loads(own.read_text()) if own.exists() else {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--model {model}: expected a folder with stage1 and stage2: {error}") from None
    stage = configs[0]
    usual = {"told": False, "reduce": "instance"}  # what a config that lacks them means
    return (
        told | usual | {name: stage[name] for name in ("frames", "width", "height", "told", "reduce") if name in stage}
    )


def scenes() -> dict[tuple[str, str], Path]:
    """(scene, name) -> file, of the shipped pictures and their ids and depth."""
    folders = {path.parent.name: path.parent for path in sorted(DEMO.glob("examples/*/example.png"))}
    names = ("example.png", "ids.png", "depth.png")
    return {(scene, name): folder / name for scene, folder in ({"demo": DEMO} | folders).items() for name in names}


def page_text() -> str:
    """draw.html, which alone needs no server, with what needs one at its end."""
    draw, more = (Path(__file__).with_name(name).read_text() for name in ("draw.html", "dream.html"))
    return draw.replace("</body>", more + "</body>")


# --------------------------------------------------------------------------------------------------------- who may ask


def check_sender(port: int) -> None:
    """403 for other hosts (a name that somebody points to 127.0.0.1) and for other sites' pages."""
    hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
    host, origin = request.get_header("Host", ""), request.get_header("Origin")
    if host not in hosts:
        abort(403, "this server answers to 127.0.0.1 only")
    wanted = [f"http://{host}"] if request.method == "POST" else [f"http://{host}", None]
    if origin not in wanted or request.get_header("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        abort(403, "this server answers only the page that it gave")


def check_size() -> None:
    """413 for large requests, 411 for those that do not say how large they are."""
    if request.method != "POST":
        return
    if "chunked" in request.get_header("Transfer-Encoding", "") or request.content_length < 0:
        abort(411, "a request must say how large it is")
    if request.content_length > LARGEST:
        left = min(request.content_length, DRAINED)
        while left > 0 and (piece := request.environ["wsgi.input"].read(min(left, 2**16))):
            left -= len(piece)
        abort(413, f"{request.content_length / 2**20:.0f} MB is too large: {LARGEST / 2**20:.0f} MB at most")


def one_line(error: HTTPError) -> str:
    response.content_type = "text/plain; charset=utf-8"
    response.headers.update(HEADERS)
    return " ".join(str(error.body).split()) + "\n"


# --------------------------------------------------------------------------------------------------------- what it asks


def tab_of() -> str:
    tab = request.query.tab
    if not re.fullmatch(r"[0-9a-f]{32}", tab):
        abort(400, "tab: expected 32 hexadecimal digits")
    return tab


def job_of(studio: Studio, number: int) -> Job:
    try:
        return studio.find(tab_of(), number)
    except KeyError:
        abort(404, f"dream {number} is not there (any more)")


def number_of(name: str) -> int:
    least, most = LIMITS[name]
    text = request.forms.get(name, "")
    if not re.fullmatch(r"\d{1,10}", text) or not least <= int(text) <= most:
        abort(400, f"{name}: expected a whole number from {least} to {most}")
    return int(text)


def start(studio: Studio) -> dict:
    """Takes a form: picture, ids, depth (files), arrows (JSON), samples, seed, steps."""
    tab, files = tab_of(), request.files
    studio.hear_tab(tab)
    if "picture" not in files:
        abort(400, "picture: missing")
    numbers = {name: number_of(name) for name in LIMITS}
    try:
        arrows = without_paths(request.forms.getunicode("arrows", ""), "ids" in files)
    except ValueError as error:
        abort(400, str(error))

    def fill(folder: Path) -> None:
        (folder / "arrows.json").write_text(arrows)
        for part, name in PARTS.items():
            if part in files:
                files[part].save(str(folder / name))

    options = [f"--{name}={numbers[name]}" for name in ("seed", "steps")]
    try:
        return studio.start(tab, fill, numbers["samples"], options).told()
    except Busy as error:
        abort(409, str(error))


def file_reply(content: bytes, kind: str, **headers: str) -> HTTPResponse:
    return HTTPResponse(content, headers=HEADERS | {"Content-Type": kind} | headers)


def paint(studio: Studio, number: int, sample: int) -> dict:
    """Takes JSON: how the motion of a finished dream is edited (page/edit.py) before it is painted again."""
    tab = tab_of()
    studio.hear_tab(tab)
    if request.content_length > LARGEST_EDIT:
        abort(413, f"edit: is too large: {LARGEST_EDIT // 1024} kB at most")
    try:
        return studio.paint(tab, number, sample, read_edit(request.body.read())).told()
    except KeyError:
        abort(404, f"dream {number} has no such sample, or is not done, or not there (any more)")
    except ValueError as error:
        abort(400, str(error))
    except Busy as error:
        abort(409, str(error))


def result(studio: Studio, number: int, sample: int, name: str) -> HTTPResponse:
    """The picture of the arrows; a panel's frames on one sheet; or the ids of all frames, as shades of gray."""
    job = job_of(studio, number)
    if not 0 <= sample < len(job.results):
        abort(404, "no such picture")
    out, panels = job.out(sample), job.results[sample]["panels"]
    if name == "input":
        content = (out / "input.png").read_bytes()
    elif name == "ids" and "segmentation" in panels:
        content = sheet_of(ids_of(out))
    elif name in panels:
        content = sheet_of(frames_of(out / f"{name}.mp4"))
    else:
        abort(404, "no such picture")
    return file_reply(content, "image/png")


def download(studio: Studio, number: int) -> HTTPResponse:
    job = job_of(studio, number)
    if job.state != "done":
        abort(404, "that dream is not done")
    name = f'attachment; filename="dream-{number}.zip"'
    return file_reply(studio.packed(job).read_bytes(), "application/zip", **{"Content-Disposition": name})


def make_app(studio: Studio, port: int, model: dict) -> Bottle:
    app, shipped = Bottle(), scenes()
    app.default_error_handler = one_line

    @app.hook("before_request")
    def check() -> None:
        response.headers.update(HEADERS)
        check_sender(port)
        check_size()

    @app.get("/")
    def page() -> str:
        return page_text()

    @app.get("/info")
    def info() -> dict:
        return {"model": model, "scenes": list(dict.fromkeys(scene for scene, _ in shipped))}

    @app.get("/scenes/<scene>/<name>")
    def scene_file(scene: str, name: str) -> HTTPResponse:
        if (scene, name) not in shipped:
            abort(404, "no such scene")
        return file_reply(shipped[scene, name].read_bytes(), "image/png")

    @app.get("/state")
    def state() -> dict:
        tab = tab_of()
        studio.hear_tab(tab)
        return {"jobs": [job.told() for job in list(studio.jobs.values()) if job.tab == tab]}

    @app.post("/dream")
    def dream() -> dict:
        return start(studio)

    @app.post("/paint/<number:int>/<sample:int>")
    def paint_again(number: int, sample: int) -> dict:
        return paint(studio, number, sample)

    @app.post("/drop/<number:int>")
    def drop(number: int) -> dict:
        studio.drop(tab_of(), number)
        return {}

    @app.post("/bye")
    def bye() -> dict:
        studio.forget(tab_of())
        return {}

    app.get("/results/<number:int>/<sample:int>/<name>", callback=lambda **place: result(studio, **place))
    app.get("/results/<number:int>/zip", callback=lambda number: download(studio, number))
    return app


# ----------------------------------------------------------------------------------------------------------- the server


class Server(ThreadingMixIn, WSGIServer):
    """A thread for each request: browsers open connections ahead and leave them waiting."""

    daemon_threads = True
    studio: Studio | None = None

    def service_actions(self) -> None:  # twice a second
        if self.studio is not None:
            self.studio.sweep()


class Handler(WSGIRequestHandler):
    timeout = 30  # seconds that a client may keep silent

    def log_message(self, *told: object) -> None:  # the terminal is for errors
        pass


def open_server(studio: Studio, model: dict, port: int = 0) -> Server:
    """On 127.0.0.1; port 0 is any that is free. Raises OSError."""
    server = make_server("127.0.0.1", port, None, server_class=Server, handler_class=Handler)
    server.set_app(make_app(studio, server.server_port, model))
    server.studio = studio
    return server


def serve(model: Path, port: int, browser: bool) -> None:
    told = describe(model)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    with own_folder() as folder:
        studio = Studio(folder, model.resolve())
        try:
            with open_server(studio, told, port) as server:
                url = f"http://127.0.0.1:{server.server_port}/"
                print(f"{url} draws and dreams; Ctrl+C ends it", flush=True)
                if browser:
                    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
                server.serve_forever()
        finally:
            studio.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m page", description="Draw arrows in the browser, press Dream, watch."
    )
    parser.add_argument("--model", type=Path, default=DEMO, metavar="DIR", help="model folder (default: demo/)")
    parser.add_argument("--port", type=int, default=0, help="of 127.0.0.1 (default: any that is free)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address (default %(default)s)")
    arguments = expand_home(parser.parse_args())
    try:
        serve(arguments.model, arguments.port, not arguments.no_browser)
    except (OSError, OverflowError, ValueError) as error:
        print(f"python -m page: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        pass
