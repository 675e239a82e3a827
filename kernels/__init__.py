"""Operations of the C x R core. Importing this package imports neither torch nor triton (see pyproject.toml)."""
