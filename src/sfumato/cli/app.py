"""The commands. One here only declares its words; the module that does the work is imported in its body.

So `sfumato --help`, `papers` and `show` start in a fraction of a second: nothing heavy is imported before a command
needs it. To add a command, write a plain function in `sfumato/cli/<name>.py` and a thin one here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli.run_commands import runs_app
from sfumato.cli.words import AsJson, Device, Runs, examples
from sfumato.errors import BadSetting

app = typer.Typer(
    name="sfumato",
    help="63 published methods that learn by hiding something, or that measure why training works.",
    epilog="Start here: sfumato papers · sfumato show colormae · sfumato train colormae --data sample:photos --minutes 2",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a bug keeps its plain traceback; a SfumatoError is one line (see `sfumato.cli.main`)
    context_settings={"help_option_names": ["-h", "--help"]},
)

CATALOGUE = "Look around"
"""The panels of `--help`: commands that belong together stand together."""


def _version(wanted: bool) -> None:
    if wanted:
        import sfumato

        print(sfumato.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command(
    rich_help_panel=CATALOGUE,
    epilog=examples(
        "sfumato papers  # all of them, by family",
        "sfumato papers blind noise  # those that mention both words, best first",
        "sfumato papers --family diffusion --json",
    ),
)
def papers(
    words: Annotated[list[str] | None, typer.Argument(help="Words that must all occur (title, tags, parts, authors).")] = None,
    family: Annotated[str | None, typer.Option("--family", "-f", help="One family only, such as masking or diffusion.")] = None,
    built: Annotated[bool, typer.Option("--built", help="Only what can be run today.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """List and search the papers."""
    from sfumato.cli import catalogue

    catalogue.papers(words or [], family=family, built=built, as_json=json)


@app.command(
    rich_help_panel=CATALOGUE,
    epilog=examples(
        "sfumato show colormae  # what it is, its settings, how to run it, how its claim came out",
        "sfumato show adahessian --json",
        "sfumato show masks --image photo.jpg -o masks.html  # every mask on your own picture, at several ratios",
    ),
)
def show(
    slug: Annotated[str, typer.Argument(help="A paper or base, as `sfumato papers` names it; or masks.")],
    json: Annotated[bool, typer.Option("--json", help="Print the row and the stored record as JSON.")] = False,
    image: Annotated[Path | None, typer.Option("--image", help="For masks: a picture; without it, a photograph of ours.")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="For masks: a run whose network says what is hard.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="For masks: the page to write.")] = Path("masks.html"),
    seed: Annotated[int, typer.Option("--seed", help="For masks: seed of the draws.")] = 0,
) -> None:
    """Tell all about one paper, or show every mask on a picture."""
    if slug == "masks":
        from sfumato.cli.masks import show_masks

        return show_masks(image, out, run=run, seed=seed)
    if image is not None or run is not None:
        raise BadSetting(f"--image and --run belong to `sfumato show masks`, not to {slug}")
    from sfumato.cli import catalogue

    catalogue.show(slug, as_json=json)


RUNNING = "Train and use"
LOOKING = "Runs and this machine"


@app.command(
    rich_help_panel=RUNNING,
    epilog=examples(
        "sfumato train cbsn --data my_photos/ --minutes 2  # learn to denoise from noisy photos alone",
        "sfumato train colormae --data sample:photos --steps 500 --set color=blue",
        "sfumato train classifier --data folder_per_class --init runs/colormae/STAMP --set optimizer=adahessian",
        "sfumato train colormae --data my_photos/ --dry-run  # what it would cost",
        "sfumato train --resume runs/cbsn/STAMP  # after a stop, a crash or a kill",
        "torchrun --nproc_per_node 4 -m sfumato train mae --data my_photos/  # several GPUs",
    ),
)
def train(
    slug: Annotated[str | None, typer.Argument(help="The method, as `sfumato papers --built` names it.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="sample:photos|digits|faces, a folder, a picture, pairs:IN:TARGET, arrays:file.npz, kitti:FOLDER, ...",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps (default: the method's).")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", "-m", help="A time instead of steps.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, as `sfumato show SLUG` lists them; may be repeated.")
    ] = None,
    preset: Annotated[str, typer.Option("--preset", help="paper, small, or auto: small on a CPU.")] = "auto",
    init: Annotated[Path | None, typer.Option("--init", help="Start from the weights of another run, or diffusers:NAME.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Continue this run; nothing else needs to be given.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell time, memory and batch shapes; write nothing.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of weights, order, augmentation and noise.")] = 0,
    device: Device = "auto",
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16.")] = "fp32",
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Micro-batches a step, to save memory.")] = 1,
    ema: Annotated[float | None, typer.Option("--ema", min=0, max=1, help="Decay of a moving average of the weights.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Loading processes (default: chosen).")] = None,
    log_every: Annotated[int | None, typer.Option("--log-every", min=1, help="Steps between lines of metrics.jsonl.")] = None,
    save_every: Annotated[
        int | None, typer.Option("--save-every", min=1, help="Steps between checkpoints (default: a minute).")
    ] = None,
    keep: Annotated[int, typer.Option("--keep", min=1, help="Checkpoints kept.")] = 2,
    track: Annotated[str | None, typer.Option("--track", help="tensorboard, mlflow or wandb.")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Train a method on your own data."""
    if resume is None and (slug is None or data is None):
        raise BadSetting("say what to train and on what: sfumato train SLUG --data WHERE (or --resume RUN)")
    if resume is not None and (slug, data, init, set_) != (None, None, None, None):
        raise BadSetting("--resume takes every setting from the run; give nothing beside it")
    from sfumato.cli import train as work

    if resume is not None or slug is None or data is None:
        work.resume(Path(resume or "."))
        return
    work.train(
        slug, data, steps=steps, minutes=minutes, settings=set_ or [], init=init, preset=preset, runs=runs, dry_run=dry_run,
        seed=seed, device=device, precision=precision, accumulate=accumulate, ema=ema, workers=workers,
        log_every=log_every, save_every=save_every, keep=keep, track=track,
    )  # fmt: skip


@app.command(
    rich_help_panel=RUNNING,
    epilog=examples(
        "sfumato apply runs/cbsn/STAMP noisy1.png noisy2.jpg -o out/  # restored pictures under their own names",
        "sfumato apply runs/colormae/STAMP my_photos/ -o embeddings.npz",
        "sfumato apply runs/classifier/STAMP new/ -o predictions.csv",
        "sfumato apply runs/ddpm/STAMP photo.png --physics sr4 --set solver=stsl -o out/  # and a before/after page",
        "sfumato apply diffusers:my_pipeline/ photo.png --physics inpaint:mask.png -o out/  # white is what is missing",
    ),
)
def apply(
    run: Annotated[Path, typer.Argument(help="A run folder or a checkpoint, or diffusers:NAME, a pipeline.")],
    inputs: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder (or a .npz, .csv file).")],
    do: Annotated[str | None, typer.Option("--do", help="restore, encode or predict, where a run can do several.")] = None,
    physics: Annotated[
        str | None,
        typer.Option("--physics", help="What degraded them: blur, blur:2, inpaint:mask.png, sr4, noise:0.1, sr4+noise:0.05."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --physics: solver=stsl|psld|dps, steps, inner, eta, lam, seed, ...; may be repeated."),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Use a trained run: restore, encode or predict."""
    from sfumato.cli import apply as work

    work.apply(run, inputs, out, verb=do, device=device, physics=physics, settings=set_ or [])


@app.command(
    rich_help_panel=RUNNING,
    epilog=examples(
        "sfumato sample runs/ddpm/STAMP -n 64 -o grid.png",
        "sfumato sample runs/ddpm/STAMP -n 1000 -o drawn/ --seed 7  # one file each",
        "sfumato sample runs/ddpm/STAMP -n 64 -o grid.png --sampler heun --steps 20",
        "sfumato sample runs/ddpm/STAMP -n 16 -o drawn.gif --sampler ddpm --steps 1000  # how they come about",
        "sfumato sample runs/ddpm/STAMP -n 16 -o cats.png --label cat --guidance 3  # trained with --set conditional=true",
        "sfumato sample runs/ddpm/STAMP -n 64 -o grid.png --keep 0.96  # the 64 steadiest of 67",
        "sfumato sample runs/mode-interpolation/STAMP -n 10000 -o points.npz",
    ),
)
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder or a checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A grid (.png; .gif: step by step), a folder, or .npz.")],
    count: Annotated[int, typer.Option("--count", "-n", help="How many.")] = 16,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of the sampler (default: as the run was set).")] = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", help="ddim, ddpm, euler or heun (default: as the run was set).")
    ] = None,
    eta: Annotated[float | None, typer.Option("--eta", help="Noise in the steps of ddim, 0 to 1.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="Class to draw, by name or number (default: all in turn).")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Towards the class: 1 none, above 1 more typical, 0 any class.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option("--keep", help="Draw more, keep this share: the samples whose trajectories vary least.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            "--window", help="FIRST:END, the steps that --keep looks at (default: 50 to 70 % of them; points: the last 2 %)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise they are drawn from.")] = 0,
    device: Device = "cpu",
) -> None:
    """Draw new pictures with a trained run."""
    from sfumato.cli import sample as work

    told = {"steps": steps, "sampler": sampler, "eta": eta, "label": label, "guidance": guidance}
    work.sample(run, count, out, seed=seed, device=device, keep=keep, window=window, told=told)


@app.command(
    rich_help_panel=RUNNING,
    epilog=examples(
        "sfumato edit runs/ddpm/STAMP --direction 0 -n 4 -o strip.png  # four new pictures along the first component",
        "sfumato edit runs/h-space-directions/STAMP --direction 2 --strength -4,0,4 --image photo.png -o strip.png",
        "sfumato edit runs/ddpm/STAMP --kind jacobian --mask mouth.png --seed 3 -o strip.png",
        "sfumato edit runs/h-space-directions/STAMP --kind attribute --direction smiling:neutral -o strip.png",
        "sfumato edit runs/h-space-directions/STAMP --kind attribute --direction smiling:neutral --without old:young -o s.png",
    ),
)
def edit(
    run: Annotated[Path, typer.Argument(help="A run of h-space-directions, or of ddpm: directions are found first.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A picture: a row a sample, a column a strength.")],
    direction: Annotated[str, typer.Option("--direction", help="Number from 0; for attribute class A, or A:B (B to A).")] = "0",
    strength: Annotated[str | None, typer.Option("--strength", help="Columns, such as -3,0,3 (default: by kind).")] = None,
    kind: Annotated[str, typer.Option("--kind", help="pca, jacobian (of each picture) or attribute (of classes).")] = "pca",
    image: Annotated[Path | None, typer.Option("--image", help="A picture to edit instead of new ones.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="For jacobian: a picture, white where it is to change.")] = None,
    without: Annotated[
        list[str] | None, typer.Option("--without", help="A or A:B, an attribute that is to stay as it is; again for another.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", help="Rows: how many new pictures.")] = 1,
    samples: Annotated[int, typer.Option("--samples", help="For a ddpm run: pictures to find components in.")] = 512,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise that pictures are drawn from.")] = 0,
    device: Device = "cpu",
) -> None:
    """Move pictures along a direction in the bottleneck of a trained diffusion model."""
    from sfumato.cli import edit as work

    work.edit(
        run, out, direction, strength, kind, image=image, mask=mask, without=without or [], count=count, samples=samples,
        seed=seed, device=device,
    )  # fmt: skip


@app.command(
    rich_help_panel=RUNNING,
    epilog=examples(
        "sfumato export runs/colormae/STAMP --timm vit.safetensors", "sfumato export runs/cbsn/STAMP --weights w.safetensors"
    ),
)
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    timm: Annotated[Path | None, typer.Option("--timm", help="Weights that a plain timm model loads.")] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="The plain state as safetensors.")] = None,
    hub: Annotated[str | None, typer.Option("--hub", help="USER/NAME on the Hugging Face hub (needs a login).")] = None,
) -> None:
    """Write a run's weights for other tools."""
    from sfumato.cli import export as work

    work.export(run, timm=timm, weights=weights, hub=hub)


@app.command(
    rich_help_panel=RUNNING,
    epilog=examples(
        "sfumato compare mae colormae simmim --data sample:photos --minutes 1  # equal time, five seeds",
        "sfumato compare classifier:optimizer=adam classifier:optimizer=adahessian --data sample:digits --steps 300",
        "sfumato compare slow=cbsn:lr=1e-3 fast=cbsn:lr=4e-3 --data pairs:NOISY:CLEAN --steps 500  # names of your own",
        "sfumato compare mae simmim --data folder_per_class --set dim=96 --set simmim:mask_unit=16 --dry-run",
    ),
)
def compare(
    arms: Annotated[
        list[str], typer.Argument(help="Two or more: SLUG, SLUG:name=value,name=value or LABEL=SLUG:...", metavar="ARM...")
    ],
    data: Annotated[str, typer.Option("--data", "-d", help="As for train; a tenth is held out where it has no test part.")],
    steps: Annotated[int | None, typer.Option("--steps", help="The same steps for every arm.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", "-m", help="The same time for every arm (default: 1).")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many; fewer than 5 give no verdict.")] = 5,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE for every arm that has it, SLUG:NAME=VALUE for one.")
    ] = None,
    preset: Annotated[str, typer.Option("--preset", help="paper, small, or auto: small on a CPU.")] = "auto",
    device: Device = "auto",
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Trainings beside each other (default: 2 on a CPU, else 1).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell time and memory; write nothing.")] = False,
    json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where trainings and the page go (default: compared/ARMS).")
    ] = None,
) -> None:
    """Compare methods on the same data, budget and seeds: one page with intervals."""
    from sfumato.cli import compare as work

    work.compare(
        arms, data, steps=steps, minutes=minutes, seeds=seeds, settings=set_ or [], preset=preset, device=device,
        processes=processes, dry_run=dry_run, as_json=json, out=out,
    )  # fmt: skip


@app.command(
    rich_help_panel=CATALOGUE,
    epilog=examples(
        "sfumato reproduce colormae  # its claim, over its five verdict seeds",
        "sfumato reproduce cbsn --seeds 2  # a quick look: fewer than 5 seeds give no verdict",
        "sfumato reproduce --all --json",
    ),
)
def reproduce(
    slugs: Annotated[list[str] | None, typer.Argument(help="Papers whose claims to run.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every paper that has a claim.")] = False,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Other seeds, this many (default: those of the verdict).")] = None,
    processes: Annotated[int, typer.Option("--processes", min=0, help="Seeds beside each other, one thread each.")] = 2,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where records and pages go.")] = Path("reproduced"),
    store: Annotated[bool, typer.Option("--store", help="Keep the records in the package (for developers).")] = False,
    json: AsJson = False,
) -> None:
    """Run papers' claims; exit 1 when a verdict got worse than the stored one."""
    from sfumato.cli import reproduce as work

    if not work.reproduce(slugs or [], everything=all_, seeds=seeds, processes=processes, out=out, store=store, as_json=json):
        raise typer.Exit(1)


@app.command(
    rich_help_panel=CATALOGUE,
    epilog=examples("sfumato demo  # about four minutes on two cores", "sfumato demo --photo path.jpg -o demo/"),
)
def demo(
    photo: Annotated[Path | None, typer.Option("--photo", "-p", help="Your own picture (default: one that is shipped).")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where runs, pictures and the page go.")] = Path("demo"),
    pace: Annotated[float, typer.Option("--pace", min=0.001, max=100, help="Share of the usual training.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of noise, weights and batches.")] = 0,
) -> None:
    """Restore a photograph, train masked autoencoders, compare optimizers: one page."""
    from sfumato.cli import demo as work

    work.demo(photo, out, pace, seed)


@app.command(
    rich_help_panel=RUNNING,
    epilog=examples(
        "sfumato probe  # the kinds; with a kind: its settings",
        "sfumato probe curvature timm:resnet18 --data labelled/ --weights trained.safetensors --minutes 5",
        "sfumato probe curvature mymodels:make_net --data arrays:file.npz --loss mymodels:my_loss --set operator=hessian",
        "sfumato probe connectivity runs/classifier/A runs/classifier/B --data labelled/",
        "sfumato probe curvature runs/mae/STAMP --data my_photos/ --json",
        "sfumato probe hallucination runs/ddpm/STAMP  # its own samples: no data",
    ),
)
def probe(
    kind: Annotated[str | None, typer.Argument(help="What to measure; without it the kinds are listed.")] = None,
    model: Annotated[
        str | None, typer.Argument(help="timm:NAME, module:factory, or a run folder; without it the settings are told.")
    ] = None,
    model_b: Annotated[str | None, typer.Argument(help="The second model, where two are compared.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Where the data is, as for train.")] = None,
    minutes: Annotated[float, typer.Option("--minutes", "-m", help="Time to stay within, about.")] = 2.0,
    weights: Annotated[
        list[Path] | None, typer.Option("--weights", "-w", help="A .safetensors or .pth file; once for each model.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help="cross_entropy, mse, reconstruction or module:function (default: by the data).")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what it would cost; measure nothing.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of samples, random weights and random starts.")] = 0,
    device: Device = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where pages and numbers go.")] = Path("probed"),
    json: AsJson = False,
) -> None:
    """Measure any torch or timm model, or a run."""
    from sfumato.cli import probe as work

    if kind is None:
        return work.listing(json)
    if model is None:
        return work.explain(kind, json)
    work.probe(
        kind, model, model_b, data, minutes=minutes, settings=set_ or [], dry_run=dry_run, out=out, as_json=json,
        weights=weights or [], loss=loss, seed=seed, device=device,
    )  # fmt: skip


app.add_typer(runs_app, name="runs", rich_help_panel=LOOKING)


@app.command(rich_help_panel=LOOKING, epilog=examples("sfumato doctor --json  # paste this into a report of a problem"))
def doctor(json: AsJson = False) -> None:
    """Tell what this machine is and test that sfumato works on it."""
    from sfumato.cli import doctor as work

    if not work.doctor(json):
        raise typer.Exit(1)
