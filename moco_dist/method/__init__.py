"""What the method computes: encoder, batch norm, queue, loss, momentum."""
