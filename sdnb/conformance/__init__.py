"""Whether the numbers of this machine can be trusted: `sdnb check` tries what the measurements rely on."""
