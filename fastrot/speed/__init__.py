"""What a step costs, what bounds it, and where its time goes."""
