"""A plan for a person: every number with where it comes from."""

from dataclasses import dataclass

from moco_dist.config.address import Url
from moco_dist.config.loading import worker_count
from moco_dist.planning import measurements
from moco_dist.planning.arithmetic import Sizes
from moco_dist.planning.forecast import Forecast, weak_scaling
from moco_dist.planning.inputs import Inputs
from moco_dist.planning.measurements import CoreSeconds, Measurement
from moco_dist.run.size import checkpoint_bytes

ARITHMETIC = "arithmetic"


@dataclass(frozen=True)
class Line:
    """A name, its value, and the value's source."""

    name: str
    value: str
    source: str = ""


def lines_of(inputs: Inputs) -> list[Line]:
    """The lines of the whole forecast."""
    sizes = inputs.sizes
    usable = measurements.of_gpu(inputs.known, inputs.gpu)
    step = measurements.for_step(usable, inputs.config, sizes.local_batch)
    loading = _loader_core_seconds(inputs)
    hosts = sizes.world_size // sizes.local_world_size
    within, between = (measurements.for_network(usable, nodes) for nodes in (1, 2))
    rate_within = within.ring_bytes_per_second if within else None
    rate_between = between.ring_bytes_per_second if between else None
    if inputs.link_gigabit_per_second is not None:
        rate_between = inputs.link_gigabit_per_second * 1e9 / 8
    used = between if hosts > 1 else within
    latency = used.latency_seconds if used else 0.0
    forecast = Forecast(
        sizes, step, rate_between if hosts > 1 else rate_within, latency,
        loading.seconds if loading else None, worker_count(inputs.config.data.num_workers, None),
    )  # fmt: skip
    network_source = _network_source(inputs, hosts, used)
    nothing = measurements.missing(inputs.known, inputs.gpu)
    return [
        *_memory(sizes, step),
        *_network(sizes, forecast, network_source),
        *_step(forecast, step, nothing, network_source),
        *_loading(forecast, inputs, loading),
        *_schedule(forecast, inputs, nothing),
        *_scaling(weak_scaling(sizes, step, rate_within, rate_between, latency), sizes, nothing),
    ]


def _loader_core_seconds(inputs: Inputs) -> CoreSeconds | None:
    """Seconds for a rank's batch, as calibrated, or as the benchmark has them for its files."""
    sizes, file = inputs.sizes, inputs.benchmark
    calibrated = measurements.for_loader(inputs.known, inputs.config, sizes.local_batch, sizes.world_size)
    if calibrated and calibrated.loader_core_seconds is not None:
        return CoreSeconds(calibrated.loader_core_seconds, calibrated.source)
    return CoreSeconds(file.seconds * sizes.decodes, file.source) if file else None


def _memory(sizes: Sizes, step: Measurement | None) -> list[Line]:
    parts = sizes.memory()
    lines = [Line("memory a GPU", megabytes(sum(parts.values())), ARITHMETIC + "; without temporary buffers and CUDA")]
    lines += [Line(f"  {name}", megabytes(count), ARITHMETIC) for name, count in parts.items() if count]
    if step and step.peak_bytes:
        lines.append(Line("  peak, with the whole queue", megabytes(step.peak_bytes), step.source))
    return [*lines, Line("checkpoint", megabytes(checkpoint_bytes(sizes.config, sizes.world_size)), ARITHMETIC)]


def _network(sizes: Sizes, forecast: Forecast, source: str) -> list[Line]:
    hosts = sizes.world_size // sizes.local_world_size
    received, transfer = sizes.received(), forecast.transfer_seconds()
    lines = [Line("received a GPU and step", megabytes(sum(received.values())), ARITHMETIC)]
    for name, count in received.items():
        time = f", {milliseconds(transfer[name])}" if transfer and count else ""
        lines.append(Line(f"  {name}", megabytes(count) + time, ARITHMETIC + (f"; time: {source}" if time else "")))
    if hosts > 1:
        lines.append(Line("  into a host", megabytes(sum(sizes.into_host().values())), ARITHMETIC + ", rings"))
    if transfer is None:
        lines.append(Line("  time", source))
    return lines


def _network_source(inputs: Inputs, hosts: int, used: Measurement | None) -> str:
    if hosts > 1 and inputs.link_gigabit_per_second is not None:
        return f"--link-gigabit-per-second {inputs.link_gigabit_per_second:g}, taken at its face value"
    if used:
        return f"all-reduce {used.source}"
    if inputs.sizes.world_size == 1:
        return ARITHMETIC
    if hosts > 1:
        return "not known: give --link-gigabit-per-second, or --calibrate under torchrun on two hosts"
    return "not measured: run with --calibrate under torchrun --nproc-per-node"


def _step(forecast: Forecast, step: Measurement | None, nothing: str, network_source: str) -> list[Line]:
    seconds = forecast.step_seconds()
    batch = forecast.sizes.local_batch * forecast.sizes.world_size
    if step is None:
        return [Line("step", nothing)]
    lines = [Line("computing a step", milliseconds(step.parts["step"]), step.source)]
    lines += [Line(f"  {name}", milliseconds(value), step.source) for name, value in step.parts.items()
              if name != "step"]  # fmt: skip
    waited = forecast.waited_for_network()
    if waited is None or seconds is None:
        return [*lines, Line("step", f"without the network it is not known: {network_source}")]
    return [
        *lines,
        Line("waiting for the network", milliseconds(waited), f"bytes: {ARITHMETIC}; time: {network_source}"),
        Line("step", f"{milliseconds(seconds)}, {batch / seconds:,.0f} images/s", "the two above, and loading"),
        Line("bottleneck", forecast.bottleneck() or "", "the longest of computing, network and loading"),
    ]


def _loading(forecast: Forecast, inputs: Inputs, loading: CoreSeconds | None) -> list[Line]:
    sizes, data = forecast.sizes, inputs.config.data
    compute, network = forecast.compute_seconds, forecast.waited_for_network()
    decodes = f"{sizes.decodes:.0f} a GPU and step"
    needed = "as soon as the step is measured"
    if compute is not None and network is not None:
        per_host = sizes.decodes / (compute + network) * sizes.local_world_size
        needed = f"{decodes}; {per_host:,.0f} a second and host, or the GPUs wait"
    lines = [Line("files to decode", needed if compute and network is not None else f"{decodes}; rate {needed}",
                  ARITHMETIC + "; step as above"), Line("key views", sizes.keys.text(), ARITHMETIC)]  # fmt: skip
    if isinstance(data.root, Url):
        most = "nine tenths of what is free" if data.cache_bytes is None else megabytes(data.cache_bytes)
        kept = f"up to {most} of a host's disk" if data.cache_dir else "no: every epoch fetches all images anew"
        lines.append(Line("images kept on disk", kept, "data.cache_dir, data.cache_bytes"))
    if loading is None:
        missing = f"benchmarks/loader.py for {data.loader} at {data.image_size} px in {inputs.places}"
        return [*lines, Line("cores to decode", "not measured: run with --calibrate where data.root is (no "
                             f"calibration, and no result of {missing})")]  # fmt: skip
    each = loading.seconds / sizes.decodes
    lines.append(Line(f"  {data.loader}", f"{1000 * each:.2f} core-ms a file", loading.source))
    if compute is not None and network is not None:
        cores = loading.seconds / (compute + network)
        lines.append(Line("cores to decode", f"{cores:.1f} a GPU, {cores * sizes.local_world_size:.0f} a host "
                          f"(data.num_workers is {worker_count(data.num_workers, None)})", loading.source))  # fmt: skip
    return lines


def _schedule(forecast: Forecast, inputs: Inputs, nothing: str) -> list[Line]:
    optim, seconds = inputs.config.optim, forecast.step_seconds()
    if inputs.num_images is None:
        return [Line("whole schedule", "the data set is not here: give --num-images")]
    images, source = inputs.num_images
    steps = images // optim.global_batch_size * optim.epochs
    lines = [Line("steps", f"{steps:,} = {optim.epochs} epochs x {images // optim.global_batch_size:,}",
                  f"{images:,} images, {source}")]  # fmt: skip
    short = inputs.config.of_method.too_short(optim.global_batch_size, steps)
    lines += [Line("  too short", line, ARITHMETIC) for line in short]
    if seconds is None:
        return [*lines, Line("whole schedule", nothing if forecast.step is None else "as soon as the network is known")]
    return [*lines, Line("whole schedule", f"{steps * seconds / 3600:,.1f} hours", "steps x step; without evaluation")]


def _scaling(rows: list[tuple[int, float | None]], sizes: Sizes, nothing: str) -> list[Line]:
    name = f"efficiency, {sizes.local_batch} samples a GPU"
    if all(efficiency is None for _, efficiency in rows):
        return [Line(name, nothing)]
    cells = [f"{gpus}: {f'{100 * efficiency:.0f} %' if efficiency else '?'}" for gpus, efficiency in rows]
    note = "step of 1 GPU / step; the global batch grows along"
    if any(efficiency is None for _, efficiency in rows):
        note += "; ?: the rate of that link is not known"
    return [Line(name, "  ".join(cells), note)]


def megabytes(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def milliseconds(seconds: float) -> str:
    """Seconds for a person."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:,.2f} ms"


def text(lines: list[Line]) -> str:
    """Two columns, and the sources numbered below, so that each number has one and the table stays narrow."""
    numbers: dict[str, int] = {}
    rows = []
    for line in lines:
        mark = f"  [{numbers.setdefault(line.source, len(numbers) + 1)}]" if line.source else ""
        rows.append(f"{line.name:<32} {line.value}{mark}")
    return "\n".join([*rows, "", *(f"[{number}] {source}" for source, number in numbers.items())])
