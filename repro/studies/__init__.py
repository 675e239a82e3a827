"""Around a run: objectives on the same pairs, with their page; what a model can do with principles before any training;
what training did to following, of all published runs; a run while it works; its model as a folder for the hub."""
