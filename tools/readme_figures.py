"""Take the README's figures from the executed notebooks: python tools/readme_figures.py (after make run)."""

import base64
import io
import sys
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# File under notebooks/figures: notebook, and how the alternative text of the cell that draws it begins.
FIGURES = {
    "together.png": ("01_data_parallel_training", "Test error in per cent"),
    "volumes.png": ("01_data_parallel_training", "Two slices through"),
    "step.png": ("01_data_parallel_training", "Left: parallel efficiency"),
    "ring.png": ("02_ring_allreduce", "One panel before"),
    "gantt.png": ("03_communication_backends", "A Gantt chart of three training steps"),
    "backends.png": ("03_communication_backends", "Two panels against message size"),
    "queues.png": ("04_burst_buffer_staging", "Five panels over time"),
    "errors.png": ("05_large_batch_tuning", "Left: test error against batch"),
    "epochs.png": ("04_burst_buffer_staging", "Time of an epoch against nodes"),
    "fidelity.png": ("07_the_whole_machine", "One line for each published figure"),
}
COLOURS = 64  # keeps each file at some 20 kB


def main() -> None:
    target = ROOT / "notebooks" / "figures"
    target.mkdir(exist_ok=True)
    for name, (notebook, alt) in FIGURES.items():
        executed = ROOT / "build" / "executed" / f"{notebook}.ipynb"
        if not executed.exists():
            sys.exit(f"{executed.relative_to(ROOT)} is not there: execute the notebooks first with make run.")
        for cell in nbformat.read(executed, as_version=4).cells:
            if cell.metadata.get("alt", "").startswith(alt):
                images = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
                image = Image.open(io.BytesIO(base64.b64decode(images[0]))).convert("RGB")
                image.quantize(COLOURS).save(target / name, optimize=True)
                break
        else:
            sys.exit(f"{notebook} has no figure whose alternative text begins with {alt!r}: mend FIGURES.")


if __name__ == "__main__":
    main()
