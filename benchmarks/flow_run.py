"""A real run on the flow path: train a small SD3 for minutes, then align it over Ray and DeepSpeed.

``python benchmarks/flow_run.py --out runs/flow``; continues where it was stopped. The model is a small
StableDiffusion3Pipeline on emoji64's drawings, VAE and text encoders: after minutes it draws colored blobs. It shows
that the loop works on this path, not that its images are good. The generator starts from the reference itself.

Four runs: DI* in one step; DI* in four steps; four steps again, its learner's process killed twice; four steps again,
stopped by SIGTERM and resumed. The last three must end with the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch import Tensor

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "zoo/emoji64"
sys.path.insert(0, str(ROOT))  # for zoo.data: the drawings
HEADS, HEAD, LAYERS, CHANNELS = 4, 32, 4, 4


def untrained(folder: Path) -> None:
    """Write a StableDiffusion3Pipeline whose transformer knows nothing yet."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    reference = ZOO / "reference"
    encoders = [
        CLIPTextModelWithProjection.from_pretrained(reference / name, dtype=torch.float32)
        for name in ("text_encoder", "text_encoder_2")
    ]
    width = sum(encoder.config.hidden_size for encoder in encoders)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=LAYERS,
        attention_head_dim=HEAD, num_attention_heads=HEADS, joint_attention_dim=width,
        caption_projection_dim=HEADS * HEAD, pooled_projection_dim=sum(e.config.projection_dim for e in encoders),
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    tokenizers = [CLIPTokenizer.from_pretrained(reference / name) for name in ("tokenizer", "tokenizer_2")]
    vae = AutoencoderKL.from_pretrained(reference / "vae", torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae,
        text_encoder=encoders[0], tokenizer=tokenizers[0], text_encoder_2=encoders[1], tokenizer_2=tokenizers[1],
        text_encoder_3=None, tokenizer_3=None,
    ).save_pretrained(folder)  # fmt: skip


def pool(store: Any, count: int) -> tuple[Tensor, Tensor, Any]:
    """Latents [N, C, 16, 16] of random drawings, their prompts by number, and the conditioning of all prompts."""
    from rlhf_t2i.families.base import Conditioning
    from zoo import data

    world, colors, generator = data.load(), list(data.COLOURS), torch.Generator().manual_seed(0)
    names, styles, chosen = (
        torch.randint(n, (count,), generator=generator) for n in (len(world.names), 3, len(colors))
    )
    latents = []
    for part in torch.arange(count).split(64):
        pictures = data.compose(world.drawings[names[part], styles[part]], chosen[part], generator)
        latents.append(store.decoder.encode(pictures))
    prompts = [data.prompt(name, color) for name in world.names for color in colors]
    conditions = [store.conditioner.encode([prompt]) for prompt in [*prompts, ""]]
    return torch.cat(latents), names * len(colors) + chosen, Conditioning.cat(conditions)


def trained(folder: Path, seconds: float, batch: int = 48) -> None:
    """Train the transformer of a pipeline for so many CPU seconds, in place."""
    from rlhf_t2i.families.base import Conditioning
    from rlhf_t2i.families.store import ModelStore
    from rlhf_t2i.recipe.schema import Models, StudentSettings

    store = ModelStore(Models(reference=str(folder), generator=str(folder)), StudentSettings(), torch.device("cpu"))
    network = store.generator_network().train()
    latents, prompts, conditions = pool(store, 4096)
    tokens = store.conditioner.encoders["text_encoder"].config.max_position_embeddings
    brief = Conditioning(conditions.tensors | {"prompt_embeds": conditions.tensors["prompt_embeds"][:, :tokens]})
    average = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.99))
    generator, step, began = torch.Generator().manual_seed(0), 0, time.process_time()
    while (spent := time.process_time() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100, max(0.05, 2 * (1 - spent / seconds)))
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.1
        # Without T5 the pipeline appends 256 zero vectors to every prompt; most of the training does without.
        cond = (conditions if spent > 0.7 * seconds else brief)[
            torch.where(dropped, len(conditions) - 1, prompts[chosen])
        ]
        x0 = latents[chosen]
        t = 1000 * torch.randn(batch, generator=generator).sigmoid()
        noise = torch.randn(x0.shape, generator=generator)
        raw = store.predict(network, store.schedule.add_noise(x0, noise, t), t, cond)
        loss = (raw - (noise - x0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in network.state_dict().items():
            average[name].lerp_(value, 0.005 if step > 200 else 0.1)
        step += 1
        if step % 100 == 0:
            print(f"  step {step}, loss {float(loss.detach()):.3f}, {spent:.0f} of {seconds:.0f} CPU s", flush=True)
    module: Any = network
    module.load_state_dict(average)
    module.save_pretrained(folder / "transformer")
    (folder / "trained.json").write_text(json.dumps({"steps": step, "cpu_seconds": round(spent), "batch": batch}))


def recipe(folder: Path, steps: int, updates: int) -> dict[str, Any]:
    """DI* on the small SD3."""
    return {
        "steps": updates,
        "models": {"reference": str(folder), "generator": str(folder)},
        "student": {"steps": steps},
        "data": {"prompts": str(ZOO / "prompts/train.txt"), "held_out": str(ZOO / "prompts/held_out.txt")},
        "algorithm": {
            "rewards": [{"name": "pickscore", "scale": 100.0, "options": {"model": str(ZOO / "pickscore")}}],
            "eval_rewards": [{"name": "pickscore", "label": "judge", "options": {"model": str(ZOO / "judge")}}],
            "cfg": {"guidance_scale": 3.0},
        },
        "optimization": {
            "batch_size": 16,
            "zero_stage": 2,
            "generator": {"lr": 2e-4, "warmup_steps": 5},
            "assistant": {"lr": 4e-4, "warmup_steps": 5},
        },
        "placement": {"groups": {"all": {"roles": ["learner", "generator", "assistant", "reference", "reward"]}}},
        "checkpoints": {"every": 8},
        "logging": {"samples_every": 20},
        "evaluation": {"images": 128, "images_per_prompt": 2},
    }


def start(file: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """The run's process."""
    log = out.with_suffix(".log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_t2i.cli", "run", str(file), "--out", str(out), *more], stdout=log, stderr=log
    )


def steps_done(out: Path) -> int:
    """Generator updates that metrics.jsonl records."""
    file = out / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def wait_for(out: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Until a run has done a step."""
    while steps_done(out) < step:
        if process.poll() is not None:
            sys.exit(f"{out} ended early: see {out.with_suffix('.log')}")
        time.sleep(0.2)


def whole(file: Path, out: Path) -> None:
    """A run without disturbance; continues one that was stopped."""
    if not (out / "report.html").is_file() and start(file, out, *(["--resume"] if out.is_dir() else [])).wait():
        sys.exit(f"{out} failed: see {out.with_suffix('.log')}")


def killed(file: Path, out: Path, moments: tuple[int, ...]) -> None:
    """A run whose only worker, learner and all other roles, is killed after some of its steps."""
    if (out / "report.html").is_file():
        return
    process = start(file, out)
    for step in moments:
        wait_for(out, step, process)
        below = psutil.Process(process.pid).children(recursive=True)
        workers = [p for p in below if "".join(p.cmdline()[:1]).startswith("ray::WorkerActor")]
        if not workers:
            sys.exit("no worker to kill")
        workers[0].send_signal(signal.SIGKILL)
    if process.wait():
        sys.exit(f"{out} was not survived: see {out.with_suffix('.log')}")


def resumed(file: Path, out: Path, step: int) -> None:
    """A run that SIGTERM stops after a step, and ``--resume`` continues."""
    if (out / "report.html").is_file():
        return
    process = start(file, out)
    wait_for(out, step, process)
    process.terminate()
    if process.wait() != 143:
        sys.exit(f"{out} ended with {process.returncode}, not 143")
    if start(file, out, "--resume").wait():
        sys.exit(f"{out} was not resumed: see {out.with_suffix('.log')}")


def weights(out: Path) -> str:
    """A digest of the exported network."""
    (file,) = (out / "model/transformer").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of two networks, relative to the second's norm."""
    gap = sum(float((a[name] - b[name]).square().sum()) for name in a)
    return (gap / sum(float(b[name].square().sum()) for name in a)) ** 0.5


def local_equals_ray(file: Path, out: Path) -> float:
    """The relative distance of ten local updates from ten over Ray."""
    from safetensors.torch import load_file

    found = []
    for name, more in (("ray", []), ("local", ["--set", "placement=local"])):
        target = out / f"ten_{name}"
        if not (target / "report.html").is_file() and start(file, target, "--set", "steps=10", *more).wait():
            sys.exit(f"{target} failed: see {target.with_suffix('.log')}")
        (weight_file,) = (target / "model/transformer").glob("*.safetensors")
        found.append(load_file(weight_file))
    return largest_difference(*found)


def main() -> None:
    """Train, run four times, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/flow"))
    parser.add_argument("--minutes", type=float, default=5.0, help="CPU minutes of training the small SD3")
    parser.add_argument("--updates", type=int, nargs=2, default=[40, 24], help="of the runs in one step, and in four")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    model = out / "sd3"
    if not (model / "model_index.json").is_file():
        untrained(model)
    if not (model / "trained.json").is_file():
        trained(model, args.minutes * 60)
    recipes = {}
    updates = dict(zip((1, 4), args.updates, strict=True))
    for steps in (1, 4):
        recipes[steps] = out / f"steps_{steps}.yaml"
        recipes[steps].write_text(yaml.safe_dump(recipe(model, steps, updates[steps])))
    from rlhf_t2i.evaluation import compare

    for steps in (1, 4):
        whole(recipes[steps], out / f"run_{steps}")
        print(f"DI* in {steps} step(s), {updates[steps]} updates over Ray and DeepSpeed:")
        for row in compare.of_run(out / f"run_{steps}/evaluation").rows:
            print(f"  {row.key} ({row.kind}): {row.before:.4f} -> {row.after:.4f}, {row.errors:+.1f} standard errors")
    killed(recipes[4], out / "killed", (updates[4] // 3, updates[4] // 2 + 3))
    resumed(recipes[4], out / "resumed", updates[4] // 3 + 1)
    digests = {name: weights(out / name) for name in ("run_4", "killed", "resumed")}
    print(f"weights: {digests}; {'equal' if len(set(digests.values())) == 1 else 'DIFFERENT'}")
    print(f"ten updates in four steps, local against Ray: relative distance {local_equals_ray(recipes[4], out):.1e}")


if __name__ == "__main__":
    main()
