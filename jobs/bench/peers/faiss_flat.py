"""The nearest rows of some vectors with FAISS's flat index: read all parts with PyArrow, add them, search.

python jobs/bench/peers/faiss_flat.py OUTPUT QUERIES.npy [K]
"""

import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq


def main(output: str, queries: str, count: int = 20) -> None:
    wanted = np.load(queries).astype(np.float32)
    faiss.normalize_L2(wanted)
    index, names = faiss.IndexFlatIP(wanted.shape[1]), []
    for path in sorted(Path(output, "results").glob("*.parquet")):
        table = pq.read_table(path, columns=["image_id", "embedding"])
        vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, wanted.shape[1]).copy()
        faiss.normalize_L2(vectors)
        index.add(vectors)
        names += table["image_id"].to_pylist()
    _, found = index.search(wanted, count)
    for rows in found:
        print(*(names[row] for row in rows))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
