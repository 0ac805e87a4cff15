"""What stands on the disk after a fault: the output absent, or the whole old one, or the whole new one; never less."""
