"""A k-means fit of scikit-learn on as many MiB as argv says; prints what came out."""

import sys

import numpy as np
from sklearn.cluster import KMeans

points = (int(sys.argv[1]) << 20) // 64
dice = np.random.default_rng(3)
data = dice.normal(size=(points, 8))
data += dice.integers(0, 5, points)[:, None] * 10.0
found = KMeans(5, n_init=1, max_iter=2, random_state=0).fit(data)
print(data.nbytes, found.inertia_.hex(), found.cluster_centers_.sum().hex())
print(np.bincount(found.labels_), found.predict(data[:5]))
