"""Can the tests of the map, the hosts and the study fail? Break a copy of each in several ways and see that they do.

python tests/mutate.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

MAP = [
    (
        "geometry/ball.py",
        "more, beta, per_d = b * theta_squared / d,",
        "more, beta, per_d = theta_squared / d,",
        "forward: B left out of α",
    ),
    ("geometry/ball.py", "beta_q=-beta * d_q * per_d,", "beta_q=beta * d_q * per_d,", "backward: sign of ∂β/∂Q"),
    ("geometry/ball.py", "k_v = st * c", "k_v = t * t * c", "backward: slope of tanh² near the edge"),
    ("geometry/ball.py", "series_w = 2 / 3 +", "series_w = 1 / 3 +", "backward: the series near v = 0"),
    ("geometry/ball.py", "return -room_p * ratio", "return room_p * ratio", "inverse: sign of p's coefficient"),
    ("geometry/sphere.py", "alpha=cos - s * rq,", "alpha=cos + s * rq,", "sphere: v's radial part added, not removed"),
    ("geometry/joint_maps.py", "2 * k.alpha_v", "k.alpha_v", "backward: a factor 2"),
    ("geometry/dtypes.py", "torch.float64) else torch.float32", "torch.float64) else dtype", "half precision inside"),
]

HOSTS = [
    ("irnet.py", "T_MAX = 1e1", "T_MAX = 1.0", "IR-Net: the last t"),
    ("irnet.py", ".mul_(k * t)", ".mul_(t)", "IR-Net: the estimator without k"),
    ("irnet.py", "binary * shift.exp2()", "binary", "IR-Net: the scale left out"),
    ("recu.py", "TAU_MIN = 0.85", "TAU_MIN = 0.55", "ReCU: the first τ"),
    ("recu.py", "torch.log(2 - 2 * self.tau)", "torch.log(2.5 - 2 * self.tau)", "ReCU: the quantile"),
    ("recu.py", "if self.training:", "if not self.training:", "ReCU: when activations are divided"),
    ("siman.py", "PERCENT_START * (1 - progress)", "PERCENT_START * progress", "SiMaN: the percentile rises"),
    ("siman.py", "(magnitude - magnitude.detach())", "(weight - weight.detach())", "SiMaN: a gradient past |ŵ|"),
    ("common.py", ".mul_(-2).add_(2)", ".neg_().add_(2)", "QuadraticSign: 2 - |x|"),
]

STUDY = [
    ("reproduction/runs.py", "hbnn_plugin.apply(model, **run.options)", "hbnn_plugin.apply(model)", "arms alike"),
    ("reproduction/runs.py", "manual_seed(run.recipe.seed)", "manual_seed(len(run.arm))", "unpaired starts"),
    ("reproduction/runs.py", "return train.split(VALIDATION)", "return train, train.split(VALIDATION)[1]", "held in"),
    ("reproduction/runs.py", "max(layer.reach", "min(layer.reach", "the nearest point for the furthest"),
    ("reproduction/tables.py", "line['train_loss'][-1]", "line['train_loss'][0]", "the first epoch's loss"),
    ("reproduction/tables.py", "ratios[-max(1, len(ratios) // 4) :]", "ratios[:1]", "the first epoch's oscillation"),
    ("reproduction/tables.py", "_STEADIER = 5", "_STEADIER = 1", "the second reading is the first"),
    ("reproduction/plots.py", "[found.low, found.high]", "[found.mean, found.high]", "half an interval"),
    ("training.py", "host.set_progress(model, progress.epoch / recipe.epochs)", "pass", "hosts' schedules stand still"),
    (
        "training.py",
        "return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))",
        "return self.lr",
        "no cosine",
    ),
    ("images.py", "columns = torch.where(mirrored[:, None], width - 1 - columns, columns)", "pass", "no mirroring"),
    ("flips.py", "(changes > 1)", "(changes > 0)", "every flip an oscillation"),
    ("hosts/__init__.py", "siman.set_progress, decays_latent=False", "siman.set_progress, decays_latent=True", "SiMaN"),
]

PROTOCOL = [
    ("protocol.py", "mean(found[setting])", "found[setting][0]", "the first tuning seed decides"),
    ("protocol.py", "reverse=True)[: case", "reverse=False)[: case", "the worst are the finalists"),
    ("protocol.py", "self.pairs if self.is_tuned(*pair, lines) for", "self.pairs for", "fresh seeds before the tuning"),
]

STUDY_TESTS = ("tests/test_study_runs.py", "tests/test_reproduction_reports.py", "tests/test_training.py")

SUITES = [
    ("hbnn_plugin", MAP, ("tests/test_map.py", "tests/test_map_torch.py")),
    ("examples/hosts", HOSTS, ("tests/test_example_hosts.py",)),
    ("examples", STUDY, (*STUDY_TESTS, "tests/test_image_sets.py")),
    ("examples/reproduction", PROTOCOL, ("tests/test_reproduction.py",)),
]


def fails(name: str, good: str, bad: str, tests: tuple[str, ...]) -> bool:
    """Whether a test fails where the file says ``bad`` instead of ``good``."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("hbnn_plugin", "tests", "examples", "pyproject.toml"):
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / part)
        path = copy / name
        text = path.read_text()
        if text.count(good) != 1:
            sys.exit(f"{name} no longer holds {good!r} exactly once; renew the mutation")
        path.write_text(text.replace(good, bad))
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=copy, env={**os.environ, "PYTHONPATH": folder}, capture_output=True)
        return done.returncode == 1


def main() -> None:
    survivors = 0
    for folder, mutations, tests in SUITES:
        for name, good, bad, what in mutations:
            caught = fails(f"{folder}/{name}", good, bad, tests)
            survivors += not caught
            print(f"{'caught  ' if caught else 'SURVIVED'}  {name}: {what}", flush=True)
    sys.exit(survivors)


if __name__ == "__main__":
    main()
