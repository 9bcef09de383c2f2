"""Dark-matter-like volumes after CosmoFlow: made from a theory curve, written as TFRecord, read by index.

CosmoFlow learns three cosmological parameters from the density of dark matter in a cube. Its simulations are not at
hand, so `sample` draws lognormal fields instead: positive like a density, with the theory's power spectrum, but without
the filaments that gravity makes. The ranges of the parameters are those of CosmoFlow's simulations (the script that ran
them, github.com/NERSC/cosmoflow-sims, MUSIC/OmSiNs/runCode.py), and so is the box: they were 512 Mpc/h wide and cut in
eight, so a cube of 128^3 voxels is 256 Mpc/h wide. A smaller cube shows the same 256 Mpc/h in coarser voxels.
"""

from __future__ import annotations

import contextlib
import functools
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.fft

from nurion_utils._checks import whole_number

if TYPE_CHECKING:
    import pandas as pd

BOX_MPC_H = 256.0
RANGES = {"omega_m": (0.25, 0.35), "sigma_8": (0.78, 0.95), "n_s": (0.9, 1.0)}
_LOW, _HIGH = np.array(list(RANGES.values())).T
_PARTICLES = np.float32(8)
_INDEX = "index.csv"
_TYPES = {"file": str, **dict.fromkeys(["offset", "length", "crc32", "size"], int), **dict.fromkeys(RANGES, float)}
_COLUMNS = list(_TYPES)
# A TFRecord is: length (8 bytes), its checksum (4), the data, their checksum (4).
_HEADER_BYTES, FRAME_BYTES = 12, 16


def theory(k_h_per_mpc: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """Linear matter power spectrum today, in (Mpc/h)^3, at wave numbers above 0 in h/Mpc.

    `parameters` are Omega_m, sigma_8 and n_s. Transfer function of Eisenstein & Hu 1998, as the library colossus
    computes it.
    """
    from colossus.cosmology import cosmology

    omega_m, sigma_8, n_s = map(float, parameters)
    # Hubble's constant and the baryons, which CosmoFlow does not vary, are about Planck's. persistence="": colossus
    # would otherwise write a cache into the home directory.
    known = {"flat": True, "H0": 67.0, "Ob0": 0.049, "relspecies": False, "persistence": ""}
    universe = cosmology.Cosmology(name="volumes", Om0=omega_m, sigma8=sigma_8, ns=n_s, **known)
    return universe.matterPowerSpectrum(k_h_per_mpc, model="eisenstein98")


def _wave_numbers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared length of every wave vector of `rfftn`, in units of 2 pi / box; and how often each stands."""
    along = np.fft.fftfreq(size, 1 / size).astype(int) ** 2
    last = np.arange(size // 2 + 1) ** 2
    squared = along[:, None, None] + along[None, :, None] + last[None, None, :]
    # The half of the modes that rfftn leaves out mirrors the planes inside.
    copies = np.full(squared.shape, 2)
    copies[..., 0] = copies[..., size // 2] = 1
    return squared, copies


def lognormal(size: int, parameters: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A lognormal field of density over mean density, whose power spectrum is `theory`: float32, shape (size,) * 3.

    The correlation function xi of the density belongs to ln(1 + xi) of a Gaussian field (Coles & Jones 1991). The
    transform is made on the grid, so the spectra agree mode by mode; the few modes where the Gaussian's power would be
    negative are set to 0.
    """
    squared, copies = _wave_numbers(size)
    lengths = np.unique(squared)[1:]
    power = np.zeros(squared.max() + 1)
    power[lengths] = theory(np.sqrt(lengths) * 2 * np.pi / BOX_MPC_H, parameters)
    cells_per_volume = (size / BOX_MPC_H) ** 3
    shape = (size,) * 3
    correlation = scipy.fft.irfftn(power[squared] * cells_per_volume, shape)
    gaussian_power = np.clip(scipy.fft.rfftn(np.log1p(correlation)).real, 0, None)
    # White noise made in space keeps the field real; double precision keeps machines alike.
    noise = scipy.fft.rfftn(rng.standard_normal(shape))
    field = scipy.fft.irfftn(noise * np.sqrt(gaussian_power), shape)
    variance = (copies * gaussian_power).sum() / size**3
    return np.exp(field - variance / 2).astype(np.float32)


def sample(index: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sample ``index`` of the data set ``seed``: the same on every machine and rank, in any order.

    It is the density over mean density, float32 of shape (size, size, size), and its parameters Omega_m, sigma_8 and
    n_s, float64, uniform in `RANGES`.
    """
    # Philox is a counter keyed by its sample: no state is carried from one sample to the next.
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    parameters = rng.uniform(_LOW, _HIGH)
    return lognormal(size, parameters, rng), parameters


def network_input(density: np.ndarray) -> np.ndarray:
    """log(1 + particles) of one volume, shifted and scaled to a mean of about 0 and a spread of about 1.

    CosmoFlow's voxels of 2 Mpc/h held 8 particles on average. Shift and scale are those of one volume in the middle of
    the ranges, hence the same for all samples of a size. Without the shift a network takes several times as long to
    find sigma_8, which moves the mean by a few per cent.
    """
    mean, spread = _moments(density.shape[0])
    return (np.log1p(_PARTICLES * density) - mean) / spread


@functools.cache
def _moments(size: int) -> tuple[np.float32, np.float32]:
    reference = np.log1p(_PARTICLES * lognormal(size, (_LOW + _HIGH) / 2, np.random.default_rng(0)))
    return reference.mean(), reference.std()


def targets_of(parameters: np.ndarray) -> np.ndarray:
    """Parameters as what a network learns: each range becomes -1 to 1."""
    return (2 * (np.asarray(parameters) - _LOW) / (_HIGH - _LOW) - 1).astype(np.float32)


def parameters_of(targets: np.ndarray) -> np.ndarray:
    """Omega_m, sigma_8 and n_s of what a network says; undoes `targets_of`."""
    return _LOW + (np.asarray(targets, float) + 1) / 2 * (_HIGH - _LOW)


def power_spectrum(density: np.ndarray) -> pd.DataFrame:
    """Power spectrum of a density over mean density, in shells one fundamental wave number wide.

    The cube, of shape (size, size, size), is `BOX_MPC_H` wide; its own mean does not enter. Shells end at the Nyquist
    wave number, beyond which they are no longer full. Columns: k_h_per_mpc (mean over the shell), power_mpc3_per_h3 and
    modes (how many independent complex amplitudes were averaged, which sets the cosmic variance).
    """
    import pandas as pd

    size = density.shape[0]
    squared, copies = _wave_numbers(size)
    power = np.abs(scipy.fft.rfftn(density.astype(float))) ** 2 * BOX_MPC_H**3 / size**6
    shell = np.rint(np.sqrt(squared)).astype(int)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(shell.ravel(), (copies * values).ravel())[1 : size // 2]

    count = total(np.ones_like(power))
    k = total(np.sqrt(squared)) / count * 2 * np.pi / BOX_MPC_H
    modes = (count / 2).astype(int)
    return pd.DataFrame({"k_h_per_mpc": k, "power_mpc3_per_h3": total(power) / count, "modes": modes})


def write(directory: Path, samples: int, size: int, seed: int = 0, volumes_per_file: int = 64) -> None:
    """Write samples 0 to ``samples`` - 1 as TFRecord files with an index.

    Every file appears under its name only when it is whole, and the index last: what `Volumes` can open is complete.
    ValueError if a number is out of its range, or the directory holds volumes already.
    """
    import pandas as pd
    import tensorflow as tf

    whole_number(samples, "samples")
    whole_number(volumes_per_file, "volumes_per_file")
    if whole_number(size, "size", least=4) % 2:
        raise ValueError(f"size must be an even number of voxels, not {size}")
    directory = Path(directory)
    if (directory / _INDEX).exists():
        raise ValueError(f"{directory} holds volumes already: open them with Volumes, or name another directory")
    directory.mkdir(parents=True, exist_ok=True)

    rows = []
    for start in range(0, samples, volumes_per_file):
        path = directory / f"volumes-{start // volumes_per_file:05d}.tfrecord"
        with _whole(path) as part, tf.io.TFRecordWriter(str(part)) as writer:
            offset = 0
            for index in range(start, min(start + volumes_per_file, samples)):
                density, parameters = sample(index, size, seed)
                record = _encode(density, parameters)
                writer.write(record)
                rows.append([path.name, offset, len(record), zlib.crc32(record), size, *parameters])
                offset += len(record) + FRAME_BYTES
    with _whole(directory / _INDEX) as part:
        pd.DataFrame(rows, columns=_COLUMNS).to_csv(part, index=False)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a temporary path; rename it to ``path`` when the block ends well, remove it otherwise."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _encode(density: np.ndarray, parameters: np.ndarray) -> bytes:
    from tensorflow import train

    volume = train.Feature(bytes_list=train.BytesList(value=[density.astype("<f4").tobytes()]))
    values = train.Feature(float_list=train.FloatList(value=parameters))
    features = train.Features(feature={"volume": volume, "parameters": values})
    return train.Example(features=features).SerializeToString()


def require_whole(path: str | os.PathLike[str]) -> None:
    """OSError or ValueError with the path unless a TFRecord file can be read, and every record's checksum is right.

    TensorFlow says what is wrong with a record but not in which file, and takes an end within a header for the end.
    """
    import tensorflow as tf
    from tensorflow.python.lib.io._pywrap_record_io import RecordIterator  # public names give a warning

    with open(path, "rb"):
        pass
    wrong, read = "truncated", 0
    try:
        for record in RecordIterator(os.fspath(path), ""):
            read += len(record) + FRAME_BYTES
    except tf.errors.OpError as error:
        wrong = error.message
    if not read or read != os.path.getsize(path):
        raise ValueError(f"{path} is damaged after {read} bytes ({wrong}): write the volumes again")


def decode(record: bytes, path: str | bytes | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Network input and targets of one record; ValueError with the path of its file if it is not a volume."""
    import tensorflow as tf

    try:
        feature = tf.train.Example.FromString(record).features.feature
        volume = np.frombuffer(feature["volume"].bytes_list.value[0], "<f4")
        volume = volume.reshape((round(len(volume) ** (1 / 3)),) * 3)
        parameters = np.array(feature["parameters"].float_list.value).reshape(len(RANGES))
    except Exception as error:  # protobuf's own DecodeError, IndexError, ValueError
        wrong = f"{os.fsdecode(path)} holds a record that is not a volume ({error})"
        raise ValueError(f"{wrong}: write the volumes again") from None
    return network_input(volume)[..., None], targets_of(parameters)


class Volumes:
    """Volumes that `write` wrote, read by index; `Shard.dataset` makes a tf.data.Dataset of them.

    `index` is a table with one row per sample: file, offset, length, crc32, size, omega_m, sigma_8, n_s.
    FileNotFoundError or ValueError, with its path, if the index or a file is missing, too short or damaged.
    """

    def __init__(self, directory: Path) -> None:
        import pandas as pd

        self.directory = Path(directory)
        path = self.directory / _INDEX
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: volumes.write makes it, as the last of its files")
        wrong = f"{path} is not an index of volumes: its first line must be {','.join(_COLUMNS)}, and numbers follow"
        try:
            self.index = pd.read_csv(path, dtype=_TYPES)
        except ValueError:  # pandas' own errors are, too
            raise ValueError(wrong) from None
        if list(self.index.columns) != _COLUMNS or self.index.empty:
            raise ValueError(wrong)
        ends = (self.index["offset"] + self.index["length"]).groupby(self.index["file"]).max()
        for file, end in ends.items():
            path = self.directory / file
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing, though {_INDEX} lists it: write the volumes again")
            if (size := path.stat().st_size) < (end := end + FRAME_BYTES):
                raise ValueError(f"{path} is truncated, {size} bytes instead of {end}: write the volumes again")

    def __len__(self) -> int:
        return len(self.index)

    def read(self, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """Network inputs (n, size, size, size, 1) and targets (n, 3) of the samples asked for, both float32."""
        pairs = []
        for row in self.index.iloc[list(indices)].itertuples():
            path = self.directory / row.file
            with path.open("rb") as file:
                record = os.pread(file.fileno(), row.length, row.offset + _HEADER_BYTES)
            if zlib.crc32(record) != row.crc32:
                wrong = f"{path} is damaged at sample {row.Index} (its checksum is wrong)"
                raise ValueError(f"{wrong}: write the volumes again")
            pairs.append(decode(record, path))
        inputs, targets = zip(*pairs, strict=True)
        return np.stack(inputs), np.stack(targets)
