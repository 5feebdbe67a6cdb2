"""What tests share: backends, problems, chains, treatments, other people's modules."""
