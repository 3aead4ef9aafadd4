"""Images in Parquet files, as Hugging Face image data sets store them: a column of bytes and one of labels.

Parquet compresses groups of thousands of rows, so that reading one row means decompressing them all. A shuffled order
needs single rows: small sets are held in memory as Arrow arrays, larger ones are copied once to an uncompressed Arrow
file in the cache folder and mapped from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, MissingDependencyError
from ..files import sync
from .decode import BadImage
from .source import EncodedSource, digest, resolve_labels

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "target")
IN_MEMORY = 2 << 30  # bytes of encoded images that are held rather than mapped


class ParquetSource(EncodedSource):
    """Rows of one or several Parquet files, in the order of the files' names.

    The cache folder is `~/.cache/hieratok`, or where the environment variable HIERATOK_CACHE says.
    """

    def __init__(self, paths: Sequence[Path], name: str, in_memory: int = IN_MEMORY) -> None:
        """Raises:
        DataError: a file is damaged, or has no column of images.
        MissingDependencyError: pyarrow is not installed.
        """
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingDependencyError("Parquet files need pyarrow: pip install 'hieratok[data]'") from error
        self.name = name
        self.paths = sorted(paths)
        try:
            files = [pq.ParquetFile(path, memory_map=True) for path in self.paths]
        except Exception as error:
            raise DataError(f"{name}: not a readable Parquet file: {error}") from error
        self.starts = [0]
        for file in files:
            self.starts.append(self.starts[-1] + file.metadata.num_rows)
        if self.starts[-1] == 0:
            raise DataError(f"{name} holds no rows")
        schema = files[0].schema_arrow
        self.column = _pick(schema.names, IMAGE_COLUMNS)
        if self.column is None:
            raise DataError(f"{name} has the columns {', '.join(schema.names)}; images are looked for in "
                            f"{', '.join(IMAGE_COLUMNS)}")  # fmt: skip
        self.digest = digest([p for path in self.paths for p in (path.name, path.stat().st_size)] + [self.starts[-1]])
        size = sum(path.stat().st_size for path in self.paths)
        self._cache: Path | None = None
        try:
            self._labels, self.classes = self._read_labels(files, schema)
            if size > in_memory:
                self._cache = self._write_cache(files)
            self._images = self._map(self._cache) if self._cache else self._load(files)
        except DataError:
            raise
        except Exception as error:  # damaged pages, other columns than the first file's, no room for the cache
            raise DataError(f"{name} cannot be read: {type(error).__name__}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"_images": None} if self._cache else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._cache:
            self._images = self._map(self._cache)

    def _read_labels(self, files: Sequence[Any], schema: Any) -> tuple[Any, list[str]]:
        column = _pick(schema.names, LABEL_COLUMNS)
        if column is None:
            return resolve_labels([0] * self.starts[-1])
        values = [v for file in files for v in file.read(columns=[column]).column(0).to_pylist()]
        labels, classes = resolve_labels(values)
        names = _huggingface_names(schema, column)
        # -1 stands for no label in the hidden parts of public sets; the names say nothing of it.
        return labels, names if names and all(v in range(len(names)) for v in values) else classes

    def _load(self, files: Sequence[Any]) -> list[Any]:
        """One array of bytes per row group, in memory."""
        return [_bytes_of(batch.column(0)) for file in files for batch in self._batches(file)]

    def _write_cache(self, files: Sequence[Any]) -> Path:
        """The Arrow file that holds the same arrays uncompressed, written at the first use."""
        import pyarrow as pa

        cache = Path(os.environ.get("HIERATOK_CACHE", Path.home() / ".cache" / "hieratok"))
        cache.mkdir(parents=True, exist_ok=True)
        # Other files may have the same names and sizes: where and when they were written tells them apart.
        origin = digest(p for path in self.paths for p in (str(path.resolve()), path.stat().st_mtime_ns))
        path = cache / f"{self.digest[:16]}{origin[:16]}.arrow"
        if not self._is_whole(path):
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            schema = pa.schema([("image", pa.large_binary())])
            with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for file in files:
                    for batch in self._batches(file):
                        writer.write(pa.record_batch([_bytes_of(batch.column(0))], schema=schema))
            sync(unfinished)
            os.replace(unfinished, path)
        return path

    def _is_whole(self, cache: Path) -> bool:
        """Whether a cache holds every row; one that the machine went down with does not."""
        try:
            return sum(len(array) for array in self._map(cache)) == len(self)
        except (OSError, ValueError):  # Arrow's errors are among them
            return False

    @staticmethod
    def _map(cache: Path) -> list[Any]:
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.memory_map(str(cache)))
        return [reader.get_batch(i).column(0) for i in range(reader.num_record_batches)]

    def _batches(self, file: Any) -> Any:
        return file.iter_batches(batch_size=4096, columns=[self.column])

    def __len__(self) -> int:
        return self.starts[-1]

    def key(self, index: int) -> str:
        for path, start, end in zip(self.paths, self.starts, self.starts[1:], strict=False):
            if index < end:
                return f"{path.name}#{index - start}"
        raise IndexError(index)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read(self, index: int) -> bytes:
        for array in self._images:
            if index < len(array):
                value = array[index].as_py()
                if value is None:
                    raise BadImage("the row holds no image bytes")
                return value
            index -= len(array)
        raise IndexError(index)


def _pick(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _bytes_of(column: Any) -> Any:
    """Plain bytes of a column that is bytes or Hugging Face's struct of bytes and path."""
    import pyarrow as pa

    if pa.types.is_struct(column.type):
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(f"the column of images holds {column.type}, where encoded bytes are expected")
    return column.cast(pa.large_binary())


def _huggingface_names(schema: Any, column: str) -> list[str] | None:
    """The class names that `datasets` keeps in a file's metadata."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        return list(info["info"]["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return None
