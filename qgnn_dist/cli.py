# SPDX-License-Identifier: Apache-2.0
"""The `qgnn` command: parse, call one function, print. `qgnn bench` has a module of its own, cli_bench.py."""
from __future__ import annotations

import functools
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import render
from .cli_bench import bench
from .command import (
    Debug,
    Json,
    LogFormat,
    Outcome,
    Overwrite,
    RayAddress,
    Settings,
    beside,
    command,
    logged,
    one_of,
    then,
)

app = typer.Typer(
    name="qgnn", add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Train deep graph neural networks over many hosts with 1-8 bit messages, and classify every node.\n\n"
         "The path: [bold]partition[/bold] a graph, [bold]train[/bold] on its parts, [bold]export[/bold] the packed "
         "model, [bold]predict[/bold] all nodes; [bold]inspect[/bold] shows what lies in a store, run or model, "
         "[bold]report[/bold] draws runs. All of these may lie at s3://BUCKET/PREFIX.")
_PATH = """\
The path, here on a made graph; yours: FILE.npz, parquet:DIR, ogbn-arxiv, …

  qgnn partition synthetic:sbm --parts 2 --out store
  qgnn train store --out run --set train.epochs=60
  qgnn report run
  qgnn export run --out model.safetensors
  qgnn predict store --model model.safetensors --out predictions
  qgnn inspect model.safetensors --store store

`qgnn COMMAND --help` tells more, `qgnn settings` what --set takes, and
`qgnn --help` has the other commands.
"""
_LOOK, _ELSEWHERE = "Look and plan", "Elsewhere, and figures"
app.add_typer(bench, name="bench", rich_help_panel=_ELSEWHERE)

_command = functools.partial(command, group=app)


def _column(option: str, text: str) -> Any:
    return typer.Option(option, help=text, rich_help_panel="Columns of parquet:DIR")


@_command("qgnn partition graph.npz --parts 2 --out store")
def partition(
    source: Annotated[str, typer.Argument(
        help="OGB name (ogbn-arxiv), FILE.npz, parquet:DIR, or synthetic:arxiv|products|mid|sbm?nodes=…&edges=…")],
    parts: Annotated[int, typer.Option(
        help="Number of parts, one worker each: 1 for one machine, without Ray; one a host of a cluster.")],
    out: Annotated[str, typer.Option(help="Folder of the new store.")],
    method: Annotated[str, typer.Option(
        help="auto, metis, mtkahypar, stream or random.",
        autocompletion=one_of("auto", "metis", "mtkahypar", "stream", "random"))] = "auto",
    order: Annotated[str, typer.Option(
        help="Of rows inside a part, for speed alone: auto, source, degree, rcm, community or random.",
        autocompletion=one_of("auto", "source", "degree", "rcm", "community", "random"))] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the partitioner, and of a random order.")] = 0,
    memory: Annotated[float | None, typer.Option(
        help="GB of memory that edges may take, and each `auto` count on; default: half of what is available.")] = None,
    balance: Annotated[float | None, typer.Option(
        help="Of stream: most nodes of a part over the mean; default: 1.05.")] = None,
    edge_balance: Annotated[float | None, typer.Option(
        help="Of stream: most edges, and training nodes, of a part over the mean; default: 2.")] = None,
    like: Annotated[str | None, typer.Option(
        help="A store of the graph as it was: nodes that it has keep their part, new ones are placed.")] = None,
    standardise: Annotated[bool, typer.Option(
        "--standardise", help="Bring each dense feature column to mean 0 and deviation 1.")] = False,
    hops: Annotated[int, typer.Option(
        help="Put the means over neighbours of so many hops beside a node's own features, once and for all.")] = 0,
    features_bits: Annotated[int | None, typer.Option(
        help="Keep dense features as codes of 8, 4 or 2 bits; default: as they are.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that holds OGB data sets.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to a download whose size was shown.")] = False,
    node_id: Annotated[str, _column("--node-id", "Column of the node's id.")] = "node_id",
    src: Annotated[str, _column("--src", "Column of an edge's one end.")] = "src",
    dst: Annotated[str, _column("--dst", "Column of an edge's other end.")] = "dst",
    label: Annotated[str, _column("--label", "Column of the label.")] = "label",
    split: Annotated[str, _column("--split", "Column of the split.")] = "split",
    ray_address: RayAddress = None, overwrite: Overwrite = False, as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Cut a graph into parts and write a store."""
    from .cluster import api
    from .data.names import ColumnNames

    with render.Status("reading the graph") as status:
        result = api.partition(
            source, parts=parts, out=out, method=method, order=order, seed=seed, memory_gb=memory, balance=balance,
            edge_balance=edge_balance, like=like, root=root, yes=yes,
            columns=ColumnNames(node_id=node_id, src=src, dst=dst, label=label, split=split),
            standardise=standardise, hops=hops, features_bits=features_bits, overwrite=overwrite,
            ray_address=ray_address, progress=status.update)
    return result, then(render.partition, f"qgnn train {shlex.quote(out)} --out {beside(out, 'run')}")


@_command("qgnn train store --out run --set quant.bits=2")
def train(
    store: Annotated[str, typer.Argument(help="Folder of a store.")],
    out: Annotated[str, typer.Option(help="Folder of the run.")],
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, or start.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write RUN/tensorboard, too.")] = False,
    log_format: LogFormat = None,
    ray_address: RayAddress = None, overwrite: Overwrite = False, as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Train on the parts of a store, one worker a part."""
    from .cluster import api

    resolved = logged(log_format, config, [*(settings or []), *["log.tensorboard=on"] * tensorboard])
    with render.TrainingProgress(resolved.train.epochs) as progress:
        result = api.train(store, out=out, config=resolved, resume=resume, overwrite=overwrite,
                           ray_address=ray_address, on_epoch=progress.epoch, signals=True)
    return result, then(
        render.training, f"qgnn export {shlex.quote(out)} --out {beside(out, 'model.safetensors')}",
        f"qgnn report {shlex.quote(out)}")


@_command("qgnn export run --out model.safetensors")
def export(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    out: Annotated[str, typer.Option(help="File of the packed model.")],
    bits: Annotated[int | None, typer.Option(help="Checked against the trained width.")] = None,
    overwrite: Overwrite = False, as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Pack the best epoch's model into one file."""
    from .cluster import api

    result = api.export(run, out=out, bits=bits, overwrite=overwrite)
    return result, then(
        render.exported, f"qgnn predict STORE --model {shlex.quote(out)} --out {beside(out, 'predictions')}")


@_command("qgnn predict store --model model.safetensors --out predictions")
def predict(
    store: Annotated[str, typer.Argument(help="Folder of a store.")],
    model: Annotated[str, typer.Option(help="File of a packed model.")],
    out: Annotated[str, typer.Option(help="Folder of the Parquet files.")],
    scores: Annotated[bool, typer.Option("--scores", help="Write every class's score too.")] = False,
    trace: Annotated[bool, typer.Option(
        "--trace", help="Write OUT/trace.json: where each layer's time goes, for ui.perfetto.dev.")] = False,
    config: Annotated[Path | None, typer.Option(help="TOML file; cluster and timeouts are used.")] = None,
    settings: Settings = None,
    log_format: LogFormat = None,
    ray_address: RayAddress = None, overwrite: Overwrite = False, as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Classify every node of a store with a packed model."""
    from .cluster import api

    resolved = logged(log_format, config, settings or [])
    with render.Status("predicting"):
        result = api.predict(store, model=model, out=out, scores=scores, config=resolved,
                             trace=trace, overwrite=overwrite, ray_address=ray_address, signals=True)
    folder = json.dumps(out, ensure_ascii=False)
    code = f"import pyarrow.dataset as d; print(d.dataset({folder}, exclude_invalid_files=True).head(5))"
    return result, then(render.prediction, f"python -c {shlex.quote(code)}")


@_command("qgnn inspect model.safetensors --store store --pictures pictures", panel=_LOOK)
def inspect(
    path: Annotated[str, typer.Argument(help="A store, a run or a packed model.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every checksum.")] = False,
    store: Annotated[str | None, typer.Option(
        help="Run the packed model on this store, and measure every stage and layer.")] = None,
    pictures: Annotated[Path | None, typer.Option(
        help="Folder for pictures (SVG, PNG): of a model on a store, or of a run's multipliers.")] = None,
    overwrite: Overwrite = False, as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Show what lies in a store, run or model; with --store, what quantising does to a model."""
    from .cluster import api

    if store is None:
        return api.inspect(path, verify=verify, pictures=pictures, overwrite=overwrite), render.inspection
    with render.Status("measuring"):
        result = api.inspect(path, verify=verify, store=store, pictures=pictures, overwrite=overwrite)
    return result, render.inspection


@_command("qgnn top run", panel=_LOOK)
def top(
    run: Annotated[str, typer.Argument(help="Folder of a run, local, on a shared disk or s3://BUCKET/PREFIX.")],
    once: Annotated[bool, typer.Option("--once", help="Draw it as it stands, and end.")] = False,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Watch a run: epoch, loss, workers' seconds, bytes and memory; ends with the run. --json tells it once."""
    from . import top as live

    return live.watch(run, once=once or as_json), live.shown


@_command("qgnn report run --store store", panel=_LOOK)
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs, to be compared.")],
    out: Annotated[str | None, typer.Option(
        help="HTML file; default: RUN/report.html, or report.html here for several runs.")] = None,
    store: Annotated[list[str] | None, typer.Option(
        help="The runs' store: measure codes, clipping and smoothness of their models on it; again for more.")] = None,
    overwrite: Overwrite = False, as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Make one HTML page of a run, or of several beside each other; it needs no other file and no network."""
    from .report.api import make_report

    with render.Status("reading the runs") as status:
        result = make_report(runs, out=out, stores=store or [], overwrite=overwrite, say=status.update)
    return result, then(render.report, f"open {result['path']} in a browser")


@_command("qgnn plan --nodes 111059956 --edges 1615685872 --features 128 --classes 172 --hosts 16 --host-ram-gb 64 "
          "--host-cores 16 --link-gbps 10", panel=_LOOK)
def plan(
    source: Annotated[str | None, typer.Argument(
        help="A store, or a graph as `partition` takes it; none where --nodes and the others tell its size.")] = None,
    hosts: Annotated[int, typer.Option(help="Number of hosts.")] = 1,
    host_ram_gb: Annotated[float, typer.Option("--host-ram-gb", help="Memory of a host, GiB.")] = 64.0,
    host_cores: Annotated[int, typer.Option("--host-cores", help="Cores of a host.")] = 16,
    link_gbps: Annotated[float, typer.Option("--link-gbps", help="Link of a host, Gbit/s.")] = 10.0,
    workers_per_host: Annotated[int, typer.Option("--workers-per-host", help="For graphs without a store.")] = 1,
    nodes: Annotated[int | None, typer.Option(help="Nodes, for a plan of bare numbers.")] = None,
    edges: Annotated[int | None, typer.Option(help="Undirected edges.")] = None,
    features: Annotated[int | None, typer.Option(help="Features of a node, dense.")] = None,
    classes: Annotated[int | None, typer.Option(help="Classes.")] = None,
    train_nodes: Annotated[int | None, typer.Option(
        "--train-nodes", help="Training nodes; default: a tenth of all.")] = None,
    cut: Annotated[float | None, typer.Option(
        help="Share of the edges that will be cut, with bare numbers; default: as a random cut.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine first, some 25 s.")] = False,
    calibration: Annotated[Path | None, typer.Option(
        help="File of an earlier calibration; with --calibrate, where to keep it. Default: the user's cache.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that holds OGB data sets.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    settings: Settings = None,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Tell whether a graph fits on given hosts, and its bytes and seconds; ends with 1 where it does not fit."""
    from .config import load_config
    from .planning import plan as planning
    from .planning.show import show_plan

    resolved = load_config(config, settings or [])
    machines = planning.check_hosts(hosts, host_ram_gb, host_cores, link_gbps, workers_per_host)
    numbers = {"--nodes": nodes, "--edges": edges, "--features": features, "--classes": classes}
    with render.Status("planning") as status:
        sized, name, parts = planning.cut_of(source, numbers, hosts * workers_per_host, train_nodes=train_nodes,
                                             cut=cut, root=root, say=status.update)
        rates, found = planning.choose_rates(calibration, calibrate, say=status.update)
        return planning.make_plan(sized, machines, resolved, rates, found, parts=parts, name=name), show_plan


@_command("qgnn settings quant", panel=_LOOK)
def settings(
    word: Annotated[str, typer.Argument(help="Only settings with this in their key or meaning; none: all.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/configuration.md.")] = False,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Show every setting of --set and --config: default, allowed values, meaning."""
    from . import settings as reference

    if markdown:
        return {"markdown": reference.page()}, reference.show_page
    return {"settings": [asdict(one) for one in reference.settings(word)]}, reference.show


@_command("qgnn submit train /shared/store --out /shared/run --address http://head:8265", passes_on=True,
          panel=_ELSEWHERE)
def submit(
    words: Annotated[list[str], typer.Argument(
        metavar="COMMAND...", help="A command of qgnn and all its options; paths as the cluster's hosts see them.")],
    address: Annotated[str, typer.Option(help="Of the cluster's dashboard.", envvar="RAY_API_SERVER_ADDRESS")],
    name: Annotated[str | None, typer.Option(help="Of the job; default: Ray makes one up.")] = None,
    working_dir: Annotated[Path | None, typer.Option(
        "--working-dir", help="Local folder that goes with the job, for its configuration files.")] = None,
    wheel: Annotated[Path | None, typer.Option(
        help="Wheel of this package that goes with the job, where the cluster's hosts have none.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE for the job; again for more.")] = None,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Do not wait for the job's end.")] = False,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Run a command as a Ray job on a cluster, show its log, and end with its exit code; Ctrl-C detaches or stops."""
    from .cluster import jobs

    talk = render.JobTalk()
    result = jobs.submit(words, address=address, name=name, working_dir=working_dir, wheel=wheel,
                         environment=env or [], follow=not no_follow, on_start=talk.started, on_log=talk.log,
                         on_interrupt=talk.asked, on_warning=talk.warning)
    return result, render.job


@app.callback(invoke_without_command=True)
def _global(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if context.invoked_subcommand is None and not version:
        print(_PATH, end="", file=sys.stderr)
        raise typer.Exit(2)
    if version:
        from . import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the `qgnn` command."""
    app()


if __name__ == "__main__":
    main()
