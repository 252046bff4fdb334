# busybox from Debian packages: sandboxes ("pause") run it, pods that make volumes, and pods that tests look around from.
# Not the static one: it cannot look up names.
FROM scratch
ADD rootfs.tar /
COPY passwd /etc/passwd
RUN ["/bin/busybox", "--install", "-s", "/bin"]
CMD ["/bin/sleep", "infinity"]
