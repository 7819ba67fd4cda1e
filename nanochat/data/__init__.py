"""From files to batches: corpora, downloads, imports, the parts of the loaders; doors: nanochat.dataset, dataloader."""
