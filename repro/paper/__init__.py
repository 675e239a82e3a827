"""The authors' raw record: the published tables and figures recomputed, and judges held against it."""
