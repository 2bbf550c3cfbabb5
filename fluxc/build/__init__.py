"""`fluxc build`: the stages in order, their cache, and the bundle they end in."""
