"""A groupby of pandas over as many MiB as argv says; prints what came out, to the last bit."""

import sys

import numpy as np
import pandas as pd

rows = (int(sys.argv[1]) << 20) // 24
dice = np.random.default_rng(3)
frame = pd.DataFrame(
    {"key": dice.integers(0, 1000, rows), "a": dice.random(rows), "b": dice.random(rows)}
)
assert frame.memory_usage().sum() >= (int(sys.argv[1]) << 20) - 1000
grouped = frame.groupby("key").agg({"a": ["sum", "mean", "max"], "b": ["std", "min"]})
print(pd.util.hash_pandas_object(grouped).sum(), grouped.to_numpy().sum().hex())
