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
    Console(stderr=True, soft_wrap=True).print(f"error: {message}", style="red", markup=False, highlight=False)
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
    memory: Annotated[float | None, typer.Option(help="Memory in GB that each `auto` may count on.")] = None,
    balance: Annotated[float | None, typer.Option(
        help="Of stream: most nodes of a part over the mean; default: 1.05.")] = None,
    edge_balance: Annotated[float | None, typer.Option(
        help="Of stream: most edges, and training nodes, of a part over the mean; default: 2.")] = None,
    like: Annotated[Path | None, typer.Option(
        help="A store of the graph as it was: nodes that it has keep their part, new ones are placed.")] = None,
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
            overwrite=overwrite, ray_address=ray_address, progress=status.update)
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
                           ray_address=ray_address, on_epoch=progress.epoch)
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
