"""k-means of all vectors with FAISS: read all parts with PyArrow, train on FAISS's own sample, assign every row.

python jobs/bench/peers/faiss_kmeans.py OUTPUT [CLUSTERS]
"""

import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq


def main(output: str, clusters: int = 100) -> None:
    pieces = []
    for path in sorted(Path(output, "results").glob("*.parquet")):
        column = pq.read_table(path, columns=["embedding"])["embedding"].combine_chunks()
        pieces.append(column.flatten().to_numpy().reshape(len(column), -1))
    vectors = np.concatenate(pieces)
    del pieces
    faiss.normalize_L2(vectors)
    kmeans = faiss.Kmeans(vectors.shape[1], clusters, niter=20, spherical=True, seed=0)
    kmeans.train(vectors)
    _, cluster = kmeans.index.search(vectors, 1)
    print(np.bincount(cluster[:, 0]))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
