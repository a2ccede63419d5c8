# SPDX-License-Identifier: Apache-2.0
"""The commands of `qgnn bench`."""
from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from .command import Debug, Json, Outcome, command

__all__ = ["bench"]

bench = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Measure; every table comes as JSON too.")

_command = functools.partial(command, group=bench)

_Source = Annotated[str, typer.Argument(
    help="arxiv, mid, products, a source of dense features, or a store of one part.")]
_Kinds = Annotated[list[str] | None, typer.Option(
    "--kind", help="appnp, smp-merged, smp-two; again for more; default: all.")]
_Threads = Annotated[int, typer.Option(min=0, help="Of every system; 0: all cores.")]
_NoMemory = Annotated[bool, typer.Option("--no-memory", help="Time only; measure nobody's memory.")]
_NoPictures = Annotated[bool, typer.Option("--no-pictures", help="Draw nothing; needs no matplotlib.")]
_Keep = Annotated[Path | None, typer.Option(help="Folder that gets the graph as graph.npz.")]


@_command("qgnn bench accuracy jobs/accuracy.toml --data graphs --out accuracy --seeds 5")
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


@_command("qgnn bench search jobs/search.toml --data graphs --out search --only cora/recipe")
def search(
    grid: Annotated[Path, typer.Argument(help="TOML file as of `bench accuracy`, with a table [search].")],
    out: Annotated[Path, typer.Option(help="Folder of trials, found settings and table; one of ours is continued.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the grid's files; default: the grid's own.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Of every row, instead of the grid's.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Of every trial, instead of the grid's.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Rows at a time; default: the cores.")] = None,
    only: Annotated[str | None, typer.Option(
        help="Only rows with this in dataset/method/width/K10, and the finalist that their finals take.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget finished trials and start over.")] = False,
    as_json: Json = False, debug: Debug = False,
) -> Outcome:
    """Find each row's settings by validation figures alone, with the same budget for all rows."""
    from .bench import search as bench_search
    from .bench import show

    with show.CellProgress("trial") as progress:
        result = bench_search.search(
            grid, out=out, data=data, trials=trials, seeds=seeds, jobs=jobs, only=only, overwrite=overwrite,
            on_step=progress.step, on_start=progress.start, on_trial=progress.cell)
    return result, show.search


@_command("qgnn bench inference arxiv --out inference")
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


@_command("qgnn bench train arxiv --out training --kind smp-merged", name="train")
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


@_command("qgnn bench order synthetic:mid --out order")
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


@_command("qgnn bench exchange arxiv --out exchange --rate 1gbit --rate 100mbit --cell 2/4 --cell 1/2")
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
    from .training.stop import sigterm_stops

    cells = None if cell is None else [bench_exchange.parse_cell(word) for word in cell]
    # Namespaces outlive the process that made them.
    with sigterm_stops("its hosts are taken down; call it again"), show.steps() as step:
        result = bench_exchange.exchange(
            source, out=out, workers=workers or (4,), rates=rate or ("1gbit",), methods=method or ("random",),
            cells=cells, repeats=repeats, time_s=seconds, evaluate=evaluate, hidden=hidden, layers=layers,
            threads=threads, pictures=not no_pictures, overwrite=overwrite, on_step=step)
    return result, show.exchange


@_command("qgnn bench growth --out growth --edges 1e6 --edges 1e7 --workers 1 --workers 2")
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


@_command("qgnn bench baselines arxiv --out baselines --seconds 60")
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


@_command("qgnn bench partition synthetic:mid --out cuts --parts 8", name="partition")
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
