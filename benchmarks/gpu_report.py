"""The results of ``gpu.py`` as Markdown."""

from __future__ import annotations

from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """Tables; what failed is named first."""
    sections = results["sections"]
    done = {name: result for name, result in sections.items() if result["status"] == "done"}
    parts = [_conditions(results["settings"], done)]
    failed = [f"- **{name}**: {r['status']}" for name, r in sections.items() if r["status"] != "done"]
    left_out = [f"- {name}: left out, {why}" for name, why in results.get("left_out", {}).items()]
    parts += ["\n".join([*failed, *left_out]), _speeds(done), _plain(done.get("plain")), _memory(done.get("steps"))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _conditions(settings: dict[str, Any], done: dict[str, Any]) -> str:
    machine, flops = done.get("machine", {}), done.get("flops", {})
    size = "small networks, float32" if settings["small"] else "SDXL's full architecture, random weights, 1024 px, bf16"
    text = f"{size}; {machine.get('device', 'unknown device')}, torch {machine.get('torch', '?')}"
    if "matmul_rate" in machine:
        text += f", matrix products {machine['matmul_rate'] / 1e12:.3g} TFLOP/s"
    if flops:
        text += f"; {flops['image'] / 1e12:.4g} TFLOP an image with one assistant round"
    overrides = " ".join(f"--set {item}" for item in settings["overrides"])
    return f"{text}; batch {settings['batch']}, median of {settings['steps']} steps {overrides}".rstrip()


def _speeds(done: dict[str, Any]) -> str:
    rows = []
    base = done.get("steps", {}).get("seconds", {}).get("step")
    for name, result in done.items():
        if name not in ("steps", "remote") and not name.startswith("variant"):
            continue
        seconds = result["seconds"]
        title = {"steps": "DeepSpeed, no Ray", "remote": "the same as a Ray actor"}.get(name, name)
        share = _utilization(result["images_a_second"], done)
        at_128 = result.get("images_a_second_at_128")
        against = "-" if not base or name == "steps" else f"{100 * (seconds['step'] / base - 1):+.1f}"
        rows.append(
            f"| {title} | {seconds['assistant']:.3f} | {seconds['generator']:.3f} | {_number(seconds.get('update'))} "
            f"| {seconds['step']:.3f} | {result['images_a_second']:.3f} | {_percent(share)} "
            f"| {_number(at_128)} | {_percent(_utilization(at_128, done))} "
            f"| {against} |"
        )
    if not rows:
        return ""
    head = (
        "| | assistant, s | generator, s | of both: updates, s | step, s | images a second | MFU, % "
        "| images a second at 128 an update | MFU, % | step against the first row, % |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    return "\n".join([head, *rows])


def _utilization(images_a_second: float | None, done: dict[str, Any]) -> float | None:
    """Model FLOPs over the machine's measured rate."""
    if images_a_second is None or "machine" not in done or "flops" not in done:
        return None
    return done["flops"]["image"] * images_a_second / done["machine"]["matmul_rate"]


def _plain(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    speeds, agreement = result["images_a_second"], result["agreement"]
    checked = ", ".join(f"{name} {value:.1e}" for name, value in agreement.items())
    return (
        "| torch's AdamW, the same networks in turns | images a second |\n|---|---:|\n"
        f"| plain diffusers loop | {speeds['plain']:.3f} |\n"
        f"| framework, placement: local | {speeds['framework']:.3f} |\n"
        f"| framework / plain | {result['ratio']:.3f} |\n\nRelative differences on the same noise: {checked}."
    )


def _memory(result: dict[str, Any] | None) -> str:
    return "" if result is None else f"Memory of the first row's process, by role:\n\n{result['memory_table'].rstrip()}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
