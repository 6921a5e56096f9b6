#!/usr/bin/env python
"""Look at a run's episodes with LeRobot's own viewer, offline.

    python tools/visualize_dataset.py quickstart --list            # which episodes there are
    python tools/visualize_dataset.py quickstart -e -1             # the newest one, in a rerun window
    python tools/visualize_dataset.py quickstart -e 12 --save e.rrd
    python tools/visualize_dataset.py quickstart -e 12 --serve     # for a browser or a rerun viewer elsewhere

Takes a run's name (in runs/), a run's folder or a dataset's folder, also while the run goes on.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq

from serl_transport.contract.bounds import printable

COLUMNS = ["episode_index", "mode", "stage", "success", "truncated_by", "length", "seed", "episode_id"]
VERSION = "stats/complementary_info.policy_version/max"  # the policy version that drove last: [n]


def main(argv: list[str] | None = None) -> int:
    """Show, save or list; the exit status."""
    parser = argparse.ArgumentParser(description="Look at a run's episodes with LeRobot's viewer.")
    parser.add_argument("source", help="a run's name, a run's folder or a dataset's folder")
    parser.add_argument("-e", "--episode", type=int, default=0, help="episode index; negative counts from the end")
    parser.add_argument("--save", type=Path, metavar="FILE.rrd", help="write a rerun file instead of opening a window")
    parser.add_argument("--serve", action="store_true", help="web viewer and stream, until Ctrl-C")
    parser.add_argument("--host", default="127.0.0.1", help="with --serve: where to listen; anybody may look")
    parser.add_argument("--port", type=int, default=9876, help="with --serve: of the stream, for rerun viewers")
    parser.add_argument("--web-port", type=int, default=9090, help="with --serve: of the web page")
    parser.add_argument("--list", action="store_true", help="print the episodes and end")
    args = parser.parse_args(argv)
    try:
        root = find_dataset(args.source)
        if args.list:
            print(episode_table(root))
            return 0
        if args.serve:
            return serve(root, pick(root, args.episode), args.host, args.port, args.web_port)
        return show(root, pick(root, args.episode), args.save)
    except (ValueError, OSError) as error:
        print(f"visualize_dataset: {error}", file=sys.stderr)
        return 1


def find_dataset(source: str) -> Path:
    """The dataset folder that `source` names. ValueError says where it was looked for."""
    candidates = [Path(source), Path(source) / "dataset", Path("runs") / source / "dataset"]
    for root in candidates:
        if (root / "meta/info.json").exists():
            version = str(json.loads((root / "meta/info.json").read_text(encoding="utf-8")).get("codebase_version"))
            if not version.startswith("v3."):
                raise ValueError(
                    f"{root}: is in LeRobot's {version} format, this shows v3: tools/preflight.py --dataset {root} "
                    "names the command that converts it"
                )
            return root
    looked = ", ".join(map(str, candidates))
    raise ValueError(
        f"no dataset at {looked}: expected a run's name or folder. A run has one after its first episode; "
        "`.venv/bin/python -m serl_launcher.exporter RUN_FOLDER --once` writes it from the journal"
    )


def episodes(root: Path) -> list[dict[str, Any]]:
    """The dataset's committed episodes, as rows of its episodes files; of the statistics the policy version alone."""
    total = json.loads((root / "meta/info.json").read_text(encoding="utf-8"))["total_episodes"]
    rows: list[dict[str, Any]] = []
    for path in sorted(root.glob("meta/episodes/*/*.parquet")):
        names = [name for name in pq.read_schema(path).names if name == VERSION or not name.startswith("stats/")]
        rows += pq.read_table(path, columns=names).to_pylist()
    return rows[:total]


def episode_table(root: Path) -> str:
    rows = [[printable(str(row.get(name, ""))) for name in COLUMNS] for row in episodes(root)]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in [COLUMNS, *rows])  # fmt: skip


def pick(root: Path, index: int) -> int:
    """A valid episode index; negative ones count from the end. ValueError names the range."""
    count = len(episodes(root))
    if not -count <= index < count:
        raise ValueError(f"--episode {index}: {root} holds episodes 0 to {count - 1}")
    return index % count


def show(root: Path, episode: int, save: Path | None) -> int:
    """Run lerobot-dataset-viz on one episode; its exit status."""
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if save is None and sys.platform == "linux" and not display:
        raise ValueError(
            "there is no display here: use --save FILE.rrd and open it with `rerun FILE.rrd` elsewhere, or --serve"
        )
    if lacking := [name for name in ("lerobot", "rerun") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"not installed here: {', '.join(lacking)} (the learner's environment has them)")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "lerobot.scripts.lerobot_dataset_viz", "--repo-id", "local/run",
            "--root", str(root.resolve()), "--episode-index", str(episode), "--num-workers", "0",
            "--display-compressed-images",
        ]  # fmt: skip
        if save is not None:
            command += ["--save", "1", "--output-dir", folder]
        done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
        if done.returncode == 0 and save is not None:
            (written,) = Path(folder).glob("*.rrd")
            save.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(written, save)
            print(f"wrote {save}; open it with: rerun {save}")
    return done.returncode


def serve(root: Path, episode: int, host: str, port: int, web_port: int) -> int:
    """One episode in rerun's web viewer and as a stream, until Ctrl-C; the exit status. ValueError: a port is taken."""
    for number in (port, web_port):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, number))
            except OSError as error:
                raise ValueError(f"--host {host} port {number}: {error.strerror}; see --port and --web-port") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"episode-{episode}.rrd"
        if code := show(root, episode, path):
            return code
        shown = f"[{host}]" if ":" in host else host
        stream = f"rerun+http://{shown}:{port}/proxy"
        print(f"web page: http://{shown}:{web_port}/?url={quote(stream, safe='')}   viewer: rerun {stream}", flush=True)
        # rerun's command is a wrapper that leaves this program behind when it is ended.
        program = Path(importlib.util.find_spec("rerun_cli").origin).with_name("rerun")  # type: ignore[union-attr,arg-type]
        words = ["--serve-web", "--bind", host, "--port", str(port), "--web-viewer-port", str(web_port)]
        with subprocess.Popen([program, path, *words]) as server, contextlib.suppress(KeyboardInterrupt):
            signal.signal(signal.SIGTERM, lambda *_: server.terminate())
            return server.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
