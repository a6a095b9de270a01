"""Training speed of gossip_hvd and its peers on the same hosts, model and links."""
