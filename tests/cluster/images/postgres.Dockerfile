# PostgreSQL from Debian packages. Same user id and PATH as the well-known public image, so that one chart fits both.
FROM scratch
ADD rootfs.tar /
COPY passwd /etc/passwd
ENV PATH=/usr/lib/postgresql/15/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
USER 999:999
