# SPDX-License-Identifier: Apache-2.0
"""The `qgnn` command: parse, call one function, print; errors become exit codes (1 failed, 2 wrong use or input)."""
from __future__ import annotations

import contextlib
import functools
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import render
from .errors import QgnnError

app = typer.Typer(
    name="qgnn", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Train deep graph neural networks over many hosts with 1-8 bit messages, and classify every node.\n\n"
         "The path: [bold]partition[/bold] a graph, [bold]train[/bold] on its parts, [bold]export[/bold] the packed "
         "model, [bold]predict[/bold] all nodes; [bold]inspect[/bold] shows what lies in a store, run or model.")

bench = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Measure; every table comes as JSON too.")
app.add_typer(bench, name="bench")

Outcome = tuple[dict[str, Any], Callable[[dict[str, Any], Console], None]]
"""What a command found, and how people see it."""

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
RayAddress = Annotated[str | None, typer.Option(
    "--ray-address", help="Join this Ray cluster; default: RAY_ADDRESS, else a local Ray for this command.")]


def _command(epilog: str, group: typer.Typer = app,
             name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command whose errors are one line on stderr and whose example stands under its help."""
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            debug = bool(kwargs.get("debug"))
            if not debug:
                warnings.simplefilter("ignore", FutureWarning)
            try:
                # Ray and its workers print as they like; stdout is for the result alone.
                with contextlib.redirect_stdout(sys.stderr):
                    result, show = function(*args, **kwargs)
            except QgnnError as error:
                _fail(str(error), error.exit_code, debug, getattr(error, "remote_traceback", None))
            except KeyboardInterrupt:
                _fail(f"interrupted{_AFTER_INTERRUPT.get(function.__name__, '')}", 1, debug)
            except OSError as error:
                _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1, debug)
            except MemoryError:
                _fail("out of memory; use more parts on more hosts, or fewer bits", 1, debug)
            except Exception as error:
                first = str(error).strip().splitlines()
                _fail(f"internal error: {type(error).__name__}: {first[0] if first else ''} "
                      "(--debug shows where)", 1, debug)
            if kwargs.get("as_json"):
                print(json.dumps(result, default=str))
            else:
                show(result, Console())
            if result.get("failed"):  # a table of which some rows could not be measured
                raise typer.Exit(1)
        return group.command(name, epilog=f"Example: {epilog}")(guarded)
    return register


_AFTER_INTERRUPT = {"train": "; --resume goes on from the last checkpoint",
                    "accuracy": "; finished cells are kept, the same command goes on"}


def _fail(message: str, code: int, debug: bool, remote: str | None = None) -> None:
    if debug:
        traceback.print_exc()
        if remote:
            print(remote, file=sys.stderr)
    words = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    Console(stderr=True, soft_wrap=True).print(f"error: {words}", style="red", markup=False, highlight=False)
    raise typer.Exit(code)


@_command("qgnn partition graph.npz --parts 2 --out store")
def partition(
    source: Annotated[str, typer.Argument(
        help="OGB name (ogbn-arxiv), FILE.npz, parquet:DIR, or synthetic:arxiv|products|mid|sbm?nodes=…&edges=…")],
    parts: Annotated[int, typer.Option(help="Number of parts: one worker each.")],
    out: Annotated[Path, typer.Option(help="Folder of the new store.")],
    method: Annotated[str, typer.Option(help="auto, metis, mtkahypar, stream or random.")] = "auto",
    order: Annotated[str, typer.Option(
        help="Of rows inside a part, for speed alone: auto, source, degree, rcm, community or random.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the partitioner, and of a random order.")] = 0,
    memory: Annotated[float | None, typer.Option(
        help="GB of memory that edges may take, and each `auto` count on; default: half of what is available.")] = None,
    balance: Annotated[float | None, typer.Option(
        help="Of stream: most nodes of a part over the mean; default: 1.05.")] = None,
    edge_balance: Annotated[float | None, typer.Option(
        help="Of stream: most edges, and training nodes, of a part over the mean; default: 2.")] = None,
    like: Annotated[Path | None, typer.Option(
        help="A store of the graph as it was: nodes that it has keep their part, new ones are placed.")] = None,
    features_bits: Annotated[int | None, typer.Option(
        help="Keep dense features as codes of 8, 4 or 2 bits; default: as they are.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that holds OGB data sets.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to a download whose size was shown.")] = False,
    node_id: Annotated[str, typer.Option("--node-id", help="Parquet: column of the node's id.")] = "node_id",
    src: Annotated[str, typer.Option("--src", help="Parquet: column of an edge's one end.")] = "src",
    dst: Annotated[str, typer.Option("--dst", help="Parquet: column of an edge's other end.")] = "dst",
    label: Annotated[str, typer.Option("--label", help="Parquet: column of the label.")] = "label",
    split: Annotated[str, typer.Option("--split", help="Parquet: column of the split.")] = "split",
    ray_address: RayAddress = None, overwrite: Overwrite = False, as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Cut a graph into parts and write a store."""
    from .cluster import api
    from .data.load import ColumnNames

    with render.Status("reading the graph") as status:
        result = api.partition(
            source, parts=parts, out=out, method=method, order=order, seed=seed, memory_gb=memory, balance=balance,
            edge_balance=edge_balance, like=like, root=root, yes=yes,
            columns=ColumnNames(node_id=node_id, src=src, dst=dst, label=label, split=split),
            features_bits=features_bits, overwrite=overwrite, ray_address=ray_address, progress=status.update)
    return result, render.partition


@_command("qgnn train store --out run --set quant.bits=2")
def train(
    store: Annotated[Path, typer.Argument(help="Folder of a store.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. quant.bits=2.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, or start.")] = False,
    ray_address: RayAddress = None, overwrite: Overwrite = False, as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Train on the parts of a store, one worker a part."""
    from .cluster import api
    from .config import load_config

    resolved = load_config(config, settings or [])
    with render.TrainingProgress(resolved.train.epochs) as progress:
        result = api.train(store, out=out, config=resolved, resume=resume, overwrite=overwrite,
                           ray_address=ray_address, on_epoch=progress.epoch, signals=True)
    return result, render.training


@_command("qgnn export run --out model.safetensors")
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option(help="File of the packed model.")],
    bits: Annotated[int | None, typer.Option(help="Checked against the trained width.")] = None,
    overwrite: Overwrite = False, as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Pack the best epoch's model into one file."""
    from .cluster import api

    return api.export(run, out=out, bits=bits, overwrite=overwrite), render.exported


@_command("qgnn predict store --model model.safetensors --out predictions")
def predict(
    store: Annotated[Path, typer.Argument(help="Folder of a store.")],
    model: Annotated[Path, typer.Option(help="File of a packed model.")],
    out: Annotated[Path, typer.Option(help="Folder of the Parquet files.")],
    scores: Annotated[bool, typer.Option("--scores", help="Write every class's score too.")] = False,
    trace: Annotated[bool, typer.Option(
        "--trace", help="Write OUT/trace.json: where each layer's time goes, for ui.perfetto.dev.")] = False,
    config: Annotated[Path | None, typer.Option(help="TOML file; cluster and timeouts are used.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. cluster.threads=4.")] = None,
    ray_address: RayAddress = None, overwrite: Overwrite = False, as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Classify every node of a store with a packed model."""
    from .cluster import api
    from .config import load_config

    with render.Status("predicting"):
        result = api.predict(store, model=model, out=out, scores=scores, config=load_config(config, settings or []),
                             trace=trace, overwrite=overwrite, ray_address=ray_address)
    return result, render.prediction


@_command("qgnn inspect model.safetensors --store store --pictures pictures")
def inspect(
    path: Annotated[Path, typer.Argument(help="A store, a run or a packed model.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every checksum.")] = False,
    store: Annotated[Path | None, typer.Option(
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


@_command("qgnn bench accuracy jobs/accuracy.toml --data graphs --out accuracy --seeds 5", bench)
def accuracy(
    grid: Annotated[Path, typer.Argument(help="TOML file: datasets, methods, widths, layers, seeds.")],
    out: Annotated[Path, typer.Option(help="Folder of cells, table and pictures; one of ours is continued.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the grid's files; default: the grid's own.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds of every row, instead of the grid's.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at a time; default: the cores.")] = None,
    only: Annotated[str | None, typer.Option(help="Only rows with this in dataset/method/width/K10.")] = None,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Draw nothing; needs no matplotlib.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget finished cells and start over.")] = False,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Train a grid of settings over many seeds and tabulate the test figure at the best validation epoch."""
    from .bench import accuracy as bench_accuracy
    from .bench import show

    with show.CellProgress() as progress:
        result = bench_accuracy.accuracy(
            grid, out=out, data=data, seeds=seeds, jobs=jobs, only=only, pictures=not no_pictures,
            overwrite=overwrite, on_step=progress.step, on_start=progress.start, on_cell=progress.cell)
    return result, show.accuracy


@_command("qgnn plan --nodes 111059956 --edges 1615685872 --features 128 --classes 172 --hosts 16 --host-ram-gb 64 "
          "--host-cores 16 --link-gbps 10")
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
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine first, some 15 s.")] = False,
    calibration: Annotated[Path | None, typer.Option(
        help="File of an earlier calibration; with --calibrate, where to keep it. Default: the user's cache.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that holds OGB data sets.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. model.hidden=256.")] = None,
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


_Source = Annotated[str, typer.Argument(
    help="arxiv, mid, products, a source of dense features, or a store of one part.")]
_Kinds = Annotated[list[str] | None, typer.Option(
    "--kind", help="appnp, smp-merged, smp-two; again for more; default: all.")]
_Threads = Annotated[int, typer.Option(min=0, help="Of every system; 0: all cores.")]
_NoMemory = Annotated[bool, typer.Option("--no-memory", help="Time only; measure nobody's memory.")]
_NoPictures = Annotated[bool, typer.Option("--no-pictures", help="Draw nothing; needs no matplotlib.")]
_Keep = Annotated[Path | None, typer.Option(help="Folder that gets the graph as graph.npz.")]


@_command("qgnn bench inference arxiv --out inference", bench)
def inference(
    source: _Source,
    out: Annotated[Path, typer.Option(help="Folder of the table and the picture.")],
    kind: _Kinds = None,
    repeats: Annotated[int | None, typer.Option(
        min=1, help="Timed turns of all systems; default: 10, 3 from 2 million nodes on.")] = None,
    threads: _Threads = 0,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the perceptron.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="K.")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs that the models are trained before.")] = 20,
    keep: _Keep = None, no_memory: _NoMemory = False, no_pictures: _NoPictures = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier table.")] = False,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Time features to classes at every width beside PyG, torch and torch_sparse on the same graph."""
    from .bench import inference as bench_inference
    from .bench import show

    with show.steps() as step:
        result = bench_inference.inference(
            source, out=out, kinds=kind, repeats=repeats, threads=threads, hidden=hidden, layers=layers, epochs=epochs,
            memory=not no_memory, pictures=not no_pictures, keep=keep, overwrite=overwrite, on_step=step)
    return result, show.beside


@_command("qgnn bench train arxiv --out training --kind smp-merged", bench, "train")
def bench_train(
    source: _Source,
    out: Annotated[Path, typer.Option(help="Folder of the table and the picture.")],
    kind: _Kinds = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed epochs of all systems.")] = 10,
    threads: _Threads = 0,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the perceptron.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="K of the times.")] = 10,
    depth: Annotated[list[int] | None, typer.Option(
        min=1, help="K of the memory rows; again for more; default: 10 and 64.")] = None,
    keep: _Keep = None, no_memory: _NoMemory = False, no_pictures: _NoPictures = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier table.")] = False,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Time training epochs of one worker at every width beside full-batch PyG, torch and torch_sparse."""
    from .bench import show, training

    with show.steps() as step:
        result = training.training(
            source, out=out, kinds=kind, repeats=repeats, threads=threads, hidden=hidden, layers=layers,
            depths=depth or (10, 64), memory=not no_memory, pictures=not no_pictures, keep=keep, overwrite=overwrite,
            on_step=step)
    return result, show.beside


@_command("qgnn bench order synthetic:mid --out order", bench)
def order(
    source: Annotated[str, typer.Argument(help="A graph; its edges are used.")],
    out: Annotated[Path, typer.Option(help="Folder of the table.")],
    order: Annotated[list[str] | None, typer.Option(
        help="source, degree, rcm, community or random; again for more; default: all.")] = None,
    columns: Annotated[int, typer.Option(min=1, help="Of the states, as many as classes.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns of all orders.")] = 10,
    threads: Annotated[int, typer.Option(min=0, help="Of every kernel; 0: all cores.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier table.")] = False,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Time what gathers neighbours, torch's CSR product too, with rows in each order."""
    from .bench import order as bench_order
    from .bench import show

    with show.steps() as step:
        result = bench_order.order(source, out=out, orders=order, columns=columns, repeats=repeats, threads=threads,
                                   overwrite=overwrite, on_step=step)
    return result, show.order


@_command("qgnn bench exchange arxiv --out exchange --rate 1gbit --rate 100mbit --cell 2/4 --cell 1/2", bench)
def exchange(
    source: Annotated[str, typer.Argument(help="arxiv, mid, products, another source, or a store.")],
    out: Annotated[Path, typer.Option(help="Folder of the table and the picture.")],
    workers: Annotated[list[int] | None, typer.Option(min=2, help="Again for more; default: 4.")] = None,
    rate: Annotated[list[str] | None, typer.Option(
        help="Of a link, as 100mbit, or none; again for more; default: 1gbit.")] = None,
    method: Annotated[list[str] | None, typer.Option(
        help="random, stream or metis cut; again for more; default: random.")] = None,
    cell: Annotated[list[str] | None, typer.Option(
        help="Bits of messages/gradients, as 2/4; again for more; default: all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed epochs of every cell.")] = 5,
    seconds: Annotated[float, typer.Option(
        min=0.0, help="Also train every cell for so long and tell its accuracy; 0: do not.")] = 0.0,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Also time epochs with an evaluation.")] = False,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the perceptron.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="K.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="Of every worker.")] = 1,
    no_pictures: _NoPictures = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier table.")] = False,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Time training over links of a given rate, at every width of messages and gradients (needs root)."""
    from .bench import exchange as bench_exchange
    from .bench import show

    cells = None if cell is None else [bench_exchange.parse_cell(word) for word in cell]
    with show.steps() as step:
        result = bench_exchange.exchange(
            source, out=out, workers=workers or (4,), rates=rate or ("1gbit",), methods=method or ("random",),
            cells=cells, repeats=repeats, time_s=seconds, evaluate=evaluate, hidden=hidden, layers=layers,
            threads=threads, pictures=not no_pictures, overwrite=overwrite, on_step=step)
    return result, show.exchange


@_command("qgnn bench growth --out growth --edges 1e6 --edges 1e7 --workers 1 --workers 2", bench)
def growth(
    out: Annotated[Path, typer.Option(help="Folder of the table and the picture.")],
    edges: Annotated[list[float] | None, typer.Option(
        help="Undirected, as 1e6; again for more; default: 1, 10 and 100 million.")] = None,
    workers: Annotated[list[int] | None, typer.Option(
        min=1, help="At the fixed size; again for more; default: 1, 2, 4, 8.")] = None,
    fixed_edges: Annotated[float | None, typer.Option(help="Edges where workers vary; default: first size.")] = None,
    method: Annotated[str, typer.Option(help="stream, random or metis cut.")] = "stream",
    settings: Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. quant.bits=2.")] = None,
    link: Annotated[str, typer.Option(help="Of a worker, where time is modelled.")] = "1gbit",
    no_pictures: _NoPictures = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier table.")] = False,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Measure memory, bytes and time of training as the graph grows, and as the workers do."""
    from .bench import growth as bench_growth
    from .bench import show

    sizes = tuple(int(count) for count in edges or bench_growth.EDGES)
    with show.steps() as step:
        result = bench_growth.growth(
            out=out, edges=sizes, workers=workers or bench_growth.WORKERS,
            fixed_edges=None if fixed_edges is None else int(fixed_edges), method=method, settings=settings or (),
            link=link, pictures=not no_pictures, overwrite=overwrite, on_step=step)
    return result, show.growth


@_command("qgnn bench baselines arxiv --out baselines --seconds 60", bench)
def baselines(
    source: _Source,
    out: Annotated[Path, typer.Option(help="Folder of the table and the picture.")],
    system: Annotated[list[str] | None, typer.Option(
        help="qgnn-int2, qgnn-fp32, sign, sage-sampled; again for more; default: all.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of training, for each.")] = 120.0,
    threads: _Threads = 0,
    hidden: Annotated[int, typer.Option(min=1, help="Width of all.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="K of ours.")] = 10,
    no_pictures: _NoPictures = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier table.")] = False,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Set accuracy against time beside SIGN and sampled mini-batches, on one machine."""
    from .bench import baselines as bench_baselines
    from .bench import show

    with show.steps() as step:
        result = bench_baselines.baselines(
            source, out=out, systems=system, seconds=seconds, threads=threads, hidden=hidden, layers=layers,
            pictures=not no_pictures, overwrite=overwrite, on_step=step)
    return result, show.baselines


@_command("qgnn bench partition synthetic:mid --out cuts --parts 8", bench, "partition")
def bench_partition(
    source: Annotated[str, typer.Argument(help="A graph; its edges and training nodes are used.")],
    out: Annotated[Path, typer.Option(help="Folder of the table and the picture.")],
    method: Annotated[list[str] | None, typer.Option(
        help="metis, mtkahypar, stream or random; again for more; default: those installed.")] = None,
    parts: Annotated[int, typer.Option(min=2, help="Number of parts.")] = 8,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds, each in a turn of all methods.")] = 5,
    balance: Annotated[float | None, typer.Option(help="Of stream, as in qgnn partition.")] = None,
    edge_balance: Annotated[float | None, typer.Option(help="Of stream, as in qgnn partition.")] = None,
    no_pictures: _NoPictures = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier table.")] = False,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Cut one graph by each method: cut, seconds, peak memory and balance beside each other."""
    from .bench import partition as bench_cuts
    from .bench import show

    with show.steps() as step:
        result = bench_cuts.partition(source, out=out, methods=method, parts=parts, seeds=seeds, balance=balance,
                                      edge_balance=edge_balance, pictures=not no_pictures, overwrite=overwrite,
                                      on_step=step)
    return result, show.cuts


@app.callback(invoke_without_command=True)
def _global(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from . import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the `qgnn` command."""
    app()


if __name__ == "__main__":
    main()
