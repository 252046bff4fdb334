# A static busybox: sandboxes ("pause") run it, pods that make volumes, and pods that tests look around from.
# rootfs.tar has /bin/busybox, a link for each of its commands, and /etc/passwd.
FROM scratch
ADD rootfs.tar /
CMD ["/bin/sleep", "infinity"]
