"""Training on many devices: process group, launcher, rendezvous and sharding."""
