"""The samples on which curvature is measured, read without any effect on the run.

:func:`~.probe_set.read_probe_set` returns batches, :func:`~.population.read_population` a population from which
mini-batches are drawn, :func:`~.ordered.read_ordered_samples` single samples in a fixed order. They share these rules.

**Samples of an indexed loader**, in which torch makes the batches from a map-style dataset (``DataLoader(dataset,
batch_size=…)``), are the training samples, or ``samples`` of them drawn without replacement. Training samples are

* the whole dataset, whether it is shuffled or sharded over ranks;
* the indices of a ``SubsetRandomSampler``; those of positive weight of a ``WeightedRandomSampler``, each once and with
  equal weight (the sampling weights do not enter the Hessian); the indices that any other sampler gives in one epoch;
* without shuffling, no more than an epoch of the Trainer takes: ``limit_train_batches`` and ``overfit_batches`` (which
  stops the shuffling) restrict the samples, and so does ``drop_last``.

**Samples of any other loader** (an iterable dataset, whole batches with ``batch_size=None``, a custom batch sampler or
loader class) are the first ``samples`` that a fresh copy of the loader gives; the last batch is kept whole. Each of W
ranks reads ``samples``/W from its loader. A given ``dataloader`` is the same on all ranks, so each rank takes every
W-th batch, except that a ``DistributedSampler`` or an iterable dataset shards itself. So does, under
``Trainer(use_distributed_sampler=False)``, every sampler but torch's sequential and random ones.

**Randomness.** The data is read in this process. The random states of Python, numpy, torch and of the generators held
by the loader, its samplers, the dataset and its transforms are the same afterwards. During the reading they are seeded
with ``seed``, for an indexed loader with ``seed`` and the index of each sample: random augmentations are the same in
each reading and on any number of ranks. An iterable dataset, or a loader that is not a DataLoader, is copied together
with the data that it holds, and read from its current position.

**Resume.** What a torch loader gives depends on ``seed`` alone. Where the user's own loader, sampler or iterable
dataset chooses the samples, by a count of epochs or an order that it holds, the numbers by which it chose at the first
reading go into the monitor's checkpoint (see :mod:`~.data.position`), and a resumed run reads with them.

**Memory.** The data stays in memory, on the CPU unless the dataset makes its samples elsewhere. Users copy a batch
before they compute, because a training step may write into it.
"""
