/* Empty: bcc names it, nothing of it is used. */
