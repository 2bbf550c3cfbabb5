"""The recipe: structs, loading, errors that name the field."""
